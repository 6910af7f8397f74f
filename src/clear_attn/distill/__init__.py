"""Training of linearized attention after the same model's dense attention."""
