"""Hyper-connections: see `api`."""
