"""Rows sorted by group, each group's run times its own matrix, and the gradient of the matrices."""
