"""Values that a layer hands out on request, through the collection `intermediates` (as `nn.Module.sow`)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

INTERMEDIATES = "intermediates"


def sow(module: nn.Module, name: str, value: Any) -> None:
    """Keep `value` as variable `name` of the module where the collection is mutable: not in training, not in `init`."""
    module.sow(INTERMEDIATES, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
