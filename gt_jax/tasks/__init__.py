"""Generated tasks whose answers need a known number of steps."""
