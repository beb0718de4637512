"""What a layer of full attention is."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gt_jax.configs.json_config import Config, below

QKNorm = Literal["none", "head", "all"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Config):
    """`A`, causal attention to all earlier tokens (arXiv 1706.03762), `kv_heads` keys and values for `heads` queries.

    Query head j reads key head j // (heads / kv_heads) (arXiv 2305.13245). `gate` multiplies the output by
    sigmoid(W x), a number a channel (arXiv 2505.06708). `qk_norm` is an RMSNorm of queries and keys, of each head or
    of all heads together. With `bias` every projection has one. Rotary embedding turns the first `rope_share` of a
    head, its halves against each other. With `window` a token sees that many tokens, itself the last. `post_norm`:
    x + norm(F(x)) for mixer and MLP of these layers, with no norm before. `implementation` None is the best one of
    `pallas_kernels.causal_attention` for the length of the row.
    """

    heads: int
    kv_heads: int
    head_width: int
    gate: bool = False
    qk_norm: QKNorm = "none"
    rope: Literal["standard", "none"] = "standard"
    rope_base: float = 10000.0
    rope_share: float = 1.0
    window: int | None = None
    post_norm: bool = False
    bias: bool = False
    implementation: str | None = None

    @property
    def rope_width(self) -> int:
        """How many channels of a head are turned."""
        return 0 if self.rope == "none" else round(self.head_width * self.rope_share)

    def problems(self) -> list[str]:
        wrong = below(self, 1, "heads", "kv_heads", "head_width")
        if self.kv_heads >= 1 and self.heads % self.kv_heads:
            wrong.append(f"heads is {self.heads}; it must be a multiple of kv_heads {self.kv_heads}")
        if self.window is not None and self.window < 1:
            wrong.append(f"window is {self.window}; it must be at least 1, or null for all earlier tokens")
        if self.rope == "none":
            return wrong
        if self.rope_base <= 0:
            wrong.append(f"rope_base is {self.rope_base}; it must be positive")
        turned = self.head_width * self.rope_share
        if not 0 < self.rope_share <= 1:
            wrong.append(f"rope_share is {self.rope_share}; it must lie in (0, 1], and rope 'none' turns nothing")
        elif abs(turned - self.rope_width) > 1e-6 or self.rope_width % 2 or not self.rope_width:
            wrong.append(f"rope_share is {self.rope_share}; head_width * rope_share must be an even number, "
                         f"it is {turned:g}")
        return wrong
