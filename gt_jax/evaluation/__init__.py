"""Trained models looked at: loading, held-out scores with intervals, measured depth, generation, comparison of two."""
