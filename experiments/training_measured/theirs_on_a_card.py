"""transformers' Qwen3-Next on a GPU, its delta rule that of flash-linear-attention, products in bfloat16."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from transformers.models.qwen3_next import modeling_qwen3_next

from experiments.gpu_measured.theirs import versions
from experiments.training_measured.theirs import Theirs
from gt_jax.configs.model import ModelConfig
from gt_jax.errors import Failed


class OnACard(Theirs):
    """A model in training: float32 weights, autocast to bfloat16."""

    device = "cuda"

    def __init__(self, config: ModelConfig, tokens: int, threads: int) -> None:
        rule = inspect.getclosurevars(modeling_qwen3_next.torch_chunk_gated_delta_rule).nonlocals
        if not rule.get("is_new_implementation"):
            raise Failed("transformers does not take flash-linear-attention's delta rule; it must be 5.24 or newer")
        super().__init__(config, tokens, threads, compiled=False, experts=None)

    def products(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to bfloat16."""
        return torch.autocast("cuda", dtype=torch.bfloat16)

    @property
    def about(self) -> dict[str, Any]:
        """Parameters, and by which versions."""
        found = super().about
        return {**found, "by": ", ".join([found["by"], *(f"{name} {value}" for name, value in versions().items())])}
