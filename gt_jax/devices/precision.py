"""How exact products of float32 numbers are where a model leaves that open: JAX's names, said once on a GPU.

What must be float32 is so under every name: states, gates, routers, halting heads, norms, softmax and losses. JAX is
imported when it is asked, not before.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any, get_args

from gt_jax.errors import say
from gt_jax.options import MatmulPrecision

PRECISIONS: tuple[MatmulPrecision, ...] = get_args(MatmulPrecision)
_FIRST_WITH_TF32 = 8  # compute capability, Ampere


def add_precision_flag(p: argparse._ActionsContainer, default: MatmulPrecision | None = "default") -> None:
    """--matmul-precision, None where it is not given and `default` is None."""
    p.add_argument("--matmul-precision", choices=PRECISIONS, default=default, help="of products of float32 numbers. "
                   "default: float32 on a CPU, TensorFloat-32 on a GPU, one bfloat16 pass on a TPU; high: three passes "
                   "on a TPU; highest: float32 everywhere")  # fmt: skip


def products(precision: MatmulPrecision) -> contextlib.AbstractContextManager[Any]:
    """What is traced inside multiplies float32 numbers with this precision, where it names none itself."""
    import jax

    return contextlib.nullcontext() if precision == "default" else jax.default_matmul_precision(precision)


@contextlib.contextmanager
def computing(precision: MatmulPrecision, first: bool = True) -> Iterator[None]:
    """`products`, and a line of the `first` process where the devices round what is called float32."""
    line = rounding(precision) if first else None
    if line is not None:
        say(line)
    with products(precision):
        yield


def rounding(precision: MatmulPrecision) -> str | None:
    """What to say of the devices there are: a GPU that rounds factors to TensorFloat-32; else None."""
    import jax

    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "0")).partition(".")[0]
    known = device.platform == "gpu" and capability.isdecimal()  # other makers' cards have names there
    if not known or precision == "highest" or int(capability) < _FIRST_WITH_TF32:
        return None
    return (f"products of float32 numbers are rounded to TensorFloat-32 (10 bits) on this {device.device_kind}; "
            "--matmul-precision highest computes them in float32")  # fmt: skip
