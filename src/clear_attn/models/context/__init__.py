"""What one call carries to its attention layers, and how it gets there."""
