"""The context of a call, and how it reaches the attention layers."""
