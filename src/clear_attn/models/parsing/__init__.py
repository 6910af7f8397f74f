"""Shared helpers with which adapters parse the arguments of a call."""
