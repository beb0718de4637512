"""gt_jax: language models that decide their own depth, and grow."""
