"""What learned scalars on the residual path are worth: variants of the lambda stack, several seeds as one program."""
