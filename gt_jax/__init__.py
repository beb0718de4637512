"""gt_jax: language models that decide their own depth, and grow.

The public face. Each name is loaded from its room when it is first touched, so `import gt_jax` brings no JAX:

    config = gt_jax.preset("tiny")
    variables = gt_jax.initialise(config, seed=0)
    counts = gt_jax.measure(config, variables, batches)
    deep = gt_jax.grow(config, variables, counts)

The commands, `python -m gt_jax`, are modules of this package; where one shares its name with a function (`measure`,
`grow`, `sample`), the attribute is the function and `from gt_jax.grow import main` the command.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gt_jax.configs.model import ModelConfig
    from gt_jax.configs.presets import preset
    from gt_jax.devices.sharding import Rules, make_mesh
    from gt_jax.evaluation.generation import sample
    from gt_jax.evaluation.measurement import measure
    from gt_jax.evaluation.model_files import load, save
    from gt_jax.growth.api import grow
    from gt_jax.growth.stream import grow_checkpoint
    from gt_jax.models.forward import forward
    from gt_jax.models.language_model import initialise

__version__ = "0.2.0"
__all__ = [
    "ModelConfig", "Rules", "forward", "grow", "grow_checkpoint", "initialise", "load", "make_mesh", "measure",
    "preset", "sample", "save",
]  # fmt: skip

_ROOMS = {
    "ModelConfig": "configs.model", "preset": "configs.presets",
    "initialise": "models.language_model", "forward": "models.forward",
    "load": "evaluation.model_files", "save": "evaluation.model_files",
    "measure": "evaluation.measurement", "sample": "evaluation.generation",
    "grow": "growth.api", "grow_checkpoint": "growth.stream",
    "make_mesh": "devices.sharding", "Rules": "devices.sharding",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'gt_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"gt_jax.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """The import system binds a submodule in its package: that of a command must not hide the function of its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _ROOMS and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
