"""Where what a model says of a token depends on what is read with it, so that decoding is not the whole text's forward.

The origin's models (presets `3b`, `3b_table`, `8b`, and their tiny ones) are so; our own have neither of it.
"""

from __future__ import annotations

from gt_jax.configs.model import ModelConfig


def read_together(config: ModelConfig) -> str | None:
    """What depends on it, in a sentence; None where nothing does.

    >>> from gt_jax.configs.presets import preset
    >>> read_together(preset("tiny")) is None, "decoding" in (read_together(preset("tiny_3b")) or "")
    (True, True)
    """
    why = []
    if config.adaptive is not None and config.adaptive.halting == "batch":
        why.append("a pass ends by what all tokens that are read together say (adaptive.halting 'batch')")
    if config.gsa is not None and "G" in config.depth.types and config.gsa.variance == "row":
        why.append("how many keys a token sees depends on how long its row is (gsa.variance 'row')")
    if not why:
        return None
    return f"{', and '.join(why)}: decoding token by token is another model than one that reads the text at once"
