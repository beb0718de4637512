"""What a one-sided resolvent layer is."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gt_jax.configs.json_config import Config, below


@dataclasses.dataclass(frozen=True)
class ResolventConfig(Config):
    """`B`, the diagonal of the left-connected resolvent of a tridiagonal matrix: `heads` potentials a token.

    Each head has a potential w.x, clipped to +-`bound`, and a broadening Im z of its own. `coupling` is the matrix'
    off-diagonal: 1 ("fixed"), or a number of each head between 0 and 1 ("learned").
    """

    heads: int
    bound: float = 3.0
    coupling: Literal["fixed", "learned"] = "fixed"

    def problems(self) -> list[str]:
        wrong = below(self, 1, "heads")
        if self.bound <= 0:
            wrong.append(f"bound is {self.bound}; it must be positive")
        return wrong
