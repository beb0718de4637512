"""Values that a layer hands out on request, through a collection (as `nn.Module.sow`).

`intermediates` is a look inside, for which every pass is run. `passes` says which tokens ran a pass, and changes
nothing of what runs.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn

INTERMEDIATES = "intermediates"
PASSES = "passes"


def sow(module: nn.Module, name: str, value: Any, collection: str = INTERMEDIATES) -> None:
    """Keep `value` as variable `name` of the module where the collection is mutable: not in training, not in `init`."""
    if asked_for(module, collection):
        module.sow(collection, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def asked_for(module: nn.Module, collection: str) -> bool:
    """Whether `sow` keeps anything: a value that only it needs is not computed otherwise."""
    return module.is_mutable_collection(collection) and not module.is_initializing()
