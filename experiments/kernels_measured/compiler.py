"""Compiling for a chip that is not here, with `jax[tpu]` on any machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.kernels_measured.chips import Chip
from gt_jax.devices.pods.topologies import ENVIRONMENT

_STAGES = "(post-ra|packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization)"  # of some seventy


class CompileError(Exception):
    """The compiler's own words."""


def set_up(dump: Path) -> None:
    """Have the compiler write the schedules of kernels to `dump`. Before JAX is imported, which reads this once."""
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_pass_label_regex={_STAGES}"
    os.environ |= ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags}


def compile_for(
    chip: Chip, function: Callable[..., Any], arguments: Sequence[tuple[tuple[int, ...], str]], alone: bool
) -> Any:
    """The function of such arguments, compiled for one chip of the kind; raises CompileError.

    alone: leave all arrays in HBM. Those of a small program XLA may keep in VMEM, and a kernel then has neither their
    blocks there nor their traffic; in a model it has.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[0]
    on_it = SingleDeviceSharding(device)
    structs = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=on_it) for shape, dtype in arguments]
    try:
        return jax.jit(function).lower(*structs).compile({"xla_msa_enable": False} if alone else None)
    except Exception as error:  # JAX, Mosaic and XLA each raise classes of their own, not all of them public
        raise CompileError(f"{type(error).__name__}: {error}") from error
