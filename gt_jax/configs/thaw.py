"""Restricted fine-tuning: which layers train alone at first, and for how long."""

from __future__ import annotations

import dataclasses

from gt_jax.configs.json_config import Config, below
from gt_jax.configs.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThawConfig(Config):
    """`layers`, counted from 0, train alone for the first `steps` steps of the run; then all tensors do."""

    layers: tuple[int, ...]
    steps: int = 200

    def problems(self) -> list[str]:
        wrong = below(self, 1, "steps")
        if not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            wrong.append(f"layers is {list(self.layers)}; it must name layers from 0, each once, at least one")
        return wrong

    def misfits(self, depth: Layout) -> list[str]:
        """What does not fit a model of this layout."""
        outside = [layer for layer in self.layers if layer >= len(depth)]
        return [f"thaw.layers has {outside}; the model's layers are 0 to {len(depth) - 1}"] if outside else []
