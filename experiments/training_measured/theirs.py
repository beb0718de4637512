"""The other side: transformers' Qwen3-Next in PyTorch, eager or compiled, with PyTorch's fused AdamW."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any

import numpy as np
import torch
import transformers

from experiments.training_measured import sizes
from gt_jax.configs.model import ModelConfig


class Theirs:
    """A model in training; `compiled` by torch.compile. `experts` names one of transformers' ways to run experts."""

    device = "cpu"

    def __init__(self, config: ModelConfig, tokens: int, threads: int, compiled: bool, experts: str | None) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)  # it says that kernels for GPUs are not installed
        warnings.simplefilter("ignore")
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        qwen = transformers.Qwen3NextConfig(**sizes.qwen3_next(config, tokens))
        if experts is not None:
            qwen._experts_implementation = experts
        self._model = transformers.Qwen3NextForCausalLM(qwen).float().train().to(self.device)
        self._run = torch.compile(self._model) if compiled else self._model
        # transformers' Trainer decays matrices alone, as we do
        matrices, vectors = ([p for p in self._model.parameters() if (p.ndim > 1) == two] for two in (True, False))
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": sizes.WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
            lr=sizes.LEARNING_RATE, betas=sizes.BETAS, fused=True,
        )  # fmt: skip

    @property
    def about(self) -> dict[str, Any]:
        """Parameters, and by which versions."""
        parameters = sum(p.numel() for p in self._model.parameters())
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        return {"parameters": parameters, "passes": None, "by": versions}

    def products(self) -> contextlib.AbstractContextManager[Any]:
        """In what the forward pass runs: products are float32."""
        return contextlib.nullcontext()

    def step(self, tokens: np.ndarray) -> float:
        """One step on rows [b, t + 1]; the cross-entropy before it."""
        rows = torch.from_numpy(tokens).long().to(self.device)
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        self._optimizer.zero_grad(set_to_none=True)
        # given the targets themselves: left to shift, it would predict one token less a row
        with self.products():
            loss = self._run(input_ids=inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), sizes.CLIP)
        self._optimizer.step()
        return float(loss.detach())
