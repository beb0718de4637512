"""What happens to a model that has learned its task when its gates are let go."""
