"""What a mixture of experts is."""

from __future__ import annotations

import dataclasses

from gt_jax.configs.json_config import Config, below


@dataclasses.dataclass(frozen=True)
class MoEConfig(Config):
    """A mixture of `experts` SwiGLUs of width `expert_width` beside the shared one, `top_k` picks a token.

    `real_share` is the share of the slots that are real experts, the rest are null experts; three fields weigh the
    losses on balance, router logits and null rate. `normalise` makes the weights of a token's real picks sum to 1, else
    they are their softmax over all slots. `shared_gate` multiplies the shared expert by sigmoid(w.x), one number a
    token. `router_bias` False, where no slot is null, is a router that is a projection and nothing else.
    """

    experts: int
    expert_width: int
    top_k: int = 2
    real_share: float = 0.5
    balance_loss: float = 2e-2
    router_z_loss: float = 1e-3
    null_loss: float = 1e-2
    normalise: bool = True
    shared_gate: bool = False
    router_bias: bool = True

    @property
    def null_experts(self) -> int:
        """How many null slots there are: experts (1 - real_share) / real_share."""
        return round(self.experts * (1 - self.real_share) / self.real_share)

    def problems(self) -> list[str]:
        wrong = below(self, 1, "experts", "expert_width", "top_k")
        wrong += below(self, 0, "balance_loss", "router_z_loss", "null_loss")
        if not 0 < self.real_share <= 1:
            wrong.append(f"real_share is {self.real_share}; it must lie in (0, 1]")
        elif abs(self.null_experts - self.experts * (1 - self.real_share) / self.real_share) > 1e-6:
            wrong.append(f"real_share is {self.real_share}; experts (1 - real_share) / real_share must be whole, "
                         f"it is {self.experts * (1 - self.real_share) / self.real_share:g}")
        elif self.top_k > self.experts + self.null_experts:
            wrong.append(f"top_k is {self.top_k}; there are {self.experts + self.null_experts} slots")
        if not self.router_bias and self.real_share != 1:
            wrong.append(f"router_bias is false and real_share {self.real_share}; null experts need the bias to be "
                         "weighed against")
        return wrong
