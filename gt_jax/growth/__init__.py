"""Growth: measured pass counts to a plan, the plan to a deeper model. Pure on pytrees; `stream` works on checkpoints."""
