"""Gated sparse attention: see `api`."""
