"""Kernels that stand alone: they import nothing of gt_jax."""
