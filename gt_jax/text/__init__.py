"""Text to batches: where text comes from, tokenizers, and rows packed for training. Nothing is downloaded."""
