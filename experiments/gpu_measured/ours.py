"""Our side of the delta rule: one implementation as jitted calls that wait for the device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu_measured.cases import Case, Inputs
from experiments.gpu_measured.timing import Side
from pallas_kernels.gated_delta_rule.api import IMPLEMENTATIONS, gated_delta_rule

KERNELS = "pallas_gpu"


def there() -> list[str]:
    """The implementations that are compared here: the kernels where this version has any, and XLA."""
    return [name for name in (KERNELS, "xla") if name in IMPLEMENTATIONS]


def side(case: Case, inputs: Inputs, implementation: str, dtype: str) -> Side:
    """Calls of one implementation; raises ValueError where it does not take the shape or the machine."""
    *arguments, state, d_output = (jnp.asarray(x) for x in inputs)
    q, k, v, g, beta = (x.astype(dtype) if i < 3 else x for i, x in enumerate(arguments))
    chosen = "reference" if case.decodes and implementation == "xla" else implementation

    def rule(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
        return gated_delta_rule(q, k, v, g, beta, implementation=chosen)

    def step(state: Any, *given: Any) -> Any:
        return gated_delta_rule(*given, initial_state=state, return_state=True, implementation=chosen)

    given = (q, k, v, g, beta)
    if case.decodes:
        decode = jax.jit(step)
        calls = {"decode": functools.partial(decode, state, *given)}
    else:
        both = jax.jit(lambda d, *x: jax.vjp(rule, *x)[1](d))
        calls = {
            "forward": functools.partial(jax.jit(rule), *given),
            "forward and backward": functools.partial(both, d_output.astype(dtype), *given),
        }
    return Side(calls, jax.block_until_ready, output)


def output(result: Any) -> np.ndarray:
    """The first array of a result, float32."""
    return np.asarray(jax.tree.leaves(result)[0], np.float32)
