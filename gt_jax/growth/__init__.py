"""Growth: measured pass counts become a plan, the plan a deeper model. Pure on pytrees; `stream` reads checkpoints."""
