"""What a module shows to who looks inside (gt_jax.inside), through the collection `intermediates`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

INTERMEDIATES = "intermediates"


def show(module: nn.Module, name: str, value: Any) -> None:
    """Keep `value` as variable `name` of the module where the collection is mutable: not in training, not in `init`."""
    module.sow(INTERMEDIATES, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
