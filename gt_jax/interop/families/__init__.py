"""Public families of hybrids: one file a family, its table of tensors and its config both ways."""
