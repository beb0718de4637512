"""The layers, one idea a file; every file has its equation in the docstring."""
