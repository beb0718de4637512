"""flash-linear-attention's side of the delta rule, on the card or (for the tests) by whatever takes its arguments."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.gpu_measured.cases import Case, Inputs
from experiments.gpu_measured.timing import Side

PACKAGES = ("torch", "triton", "flash-linear-attention")
LEAST_TRITON = (3, 7, 1)  # before it, the backward pass of the delta rule gave wrong gradients on Hopper

Rule = Callable[..., tuple[Any, Any]]


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def problems(found: dict[str, str]) -> list[str]:
    """Why there is nothing to compare with, a line each."""
    missing = [name for name in PACKAGES if name not in found]
    if missing:
        return [f"{', '.join(missing)} not installed; pip install 'gt-jax[cuda,bench-gpu]', or ask for --ours-alone"]
    numbers = tuple(int(part) for part in re.findall(r"\d+", found["triton"])[:3])
    if numbers < LEAST_TRITON:
        return [f"triton is {found['triton']}; the backward pass of flash-linear-attention needs 3.7.1 or newer"]
    return []


def whole(rule: Rule, q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
    """The output of a whole row, by a function with the names of FLA's `chunk_gated_delta_rule`."""
    return rule(q=q, k=k, v=v, g=g, beta=beta, scale=q.shape[-1] ** -0.5, output_final_state=False)[0]


def token(rule: Rule, state: Any, q: Any, k: Any, v: Any, g: Any, beta: Any) -> tuple[Any, Any]:
    """Output and state after one token, by one with those of its `fused_recurrent_gated_delta_rule`."""
    scale = q.shape[-1] ** -0.5
    return rule(q=q, k=k, v=v, g=g, beta=beta, scale=scale, initial_state=state, output_final_state=True)


def side(case: Case, inputs: Inputs, dtype: str) -> Side:
    """Calls on the first card."""
    import torch
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    tensors = [torch.from_numpy(np.array(x)).cuda() for x in inputs]
    low = getattr(torch, dtype)
    q, k, v = (x.to(low) for x in tensors[:3])
    g, beta, state, d_output = *tensors[3:6], tensors[6].to(low)
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta)]

    def quiet(call: Callable[..., Any]) -> Any:
        with torch.no_grad():
            return call()

    calls: dict[str, Callable[[], Any]]
    if case.decodes:
        step = functools.partial(token, fused_recurrent_gated_delta_rule, state, *leaves)
        calls = {"decode": functools.partial(quiet, step)}
    else:
        forward = functools.partial(whole, chunk_gated_delta_rule, *leaves)
        calls = {
            "forward": functools.partial(quiet, forward),
            "forward and backward": lambda: torch.autograd.grad(forward(), leaves, d_output),
        }
    return Side(calls, lambda _: torch.cuda.synchronize(), output, Events.make)


class Events:
    """A clock on the card: two marks in its stream, read once both have passed."""

    def __init__(self, torch: Any) -> None:
        self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._marks[0].record()

    @classmethod
    def make(cls) -> Events:
        """Started."""
        import torch

        return cls(torch)

    def milliseconds(self) -> float:
        """Since the start, of all that was launched."""
        self._marks[1].record()
        self._marks[1].synchronize()
        return float(self._marks[0].elapsed_time(self._marks[1]))


def output(result: Any) -> np.ndarray:
    """The first tensor of a result, float32."""
    first = result[0] if isinstance(result, tuple) else result
    return np.asarray(first.detach().float().cpu())
