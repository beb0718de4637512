"""Causal attention with grouped heads, in packed rows, with or without a window."""
