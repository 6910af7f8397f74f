"""The attention processors of linearized layers."""
