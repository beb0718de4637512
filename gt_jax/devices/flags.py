"""Command-line flags of processes and meshes, and what they mean. JAX is imported when a mesh is made, not before."""

from __future__ import annotations

import argparse
from typing import Any

from gt_jax.devices.meeting import split_address
from gt_jax.devices.meshes import MESH_AXES, slice_count
from gt_jax.errors import Refused
from gt_jax.options import whole

_MOST = 2**16 - 1  # processes that meet: each has a port of process 0's machine


def add_process_flags(group: argparse._ActionsContainer) -> None:
    """--coordinator, --processes and --process by hand, or --distributed."""
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes: where process 0 listens")
    group.add_argument("--processes", type=whole, metavar="N", help="how many there are; all see the same disk")
    group.add_argument("--process", type=whole, metavar="I", help="which of them this one is, from 0")
    group.add_argument("--process-timeout", type=float, default=60.0, metavar="SECONDS", help="how long processes wait "
                       "for one that does not come, does not answer or has failed (60)")  # fmt: skip
    group.add_argument("--distributed", action="store_true",
                       help="several processes, as the cluster's own environment says (jax.distributed)")  # fmt: skip


def add_mesh_flags(group: argparse._ActionsContainer) -> None:
    """--data, --fsdp, --expert and --tensor, as mesh_data and so on; None where they are not given."""
    for axis in MESH_AXES:
        group.add_argument(f"--{axis}", type=whole, dest=f"mesh_{axis}", help=f"size of the mesh axis {axis}")


def is_distributed(args: argparse.Namespace) -> bool:
    """Whether any of the flags is given."""
    return args.distributed or any(value is not None for value in (args.coordinator, args.processes, args.process))


def wrong_process_flags(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags, one line each."""
    given = [args.coordinator, args.processes, args.process]
    if args.distributed and any(value is not None for value in given):
        return ["--distributed asks the cluster; --coordinator, --processes and --process say it by hand"]
    if any(value is not None for value in given) and any(value is None for value in given):
        return ["--coordinator, --processes and --process belong together"]
    wrong = []
    if args.processes is not None and not 0 <= args.process < args.processes:
        wrong.append(f"--process {args.process}: with --processes {args.processes} it is one of 0 to "
                     f"{args.processes - 1}")  # fmt: skip
    if args.processes is not None and args.processes > _MOST:
        wrong.append(f"--processes is {args.processes}; at most {_MOST} meet")
    if args.coordinator is not None:
        try:
            split_address(args.coordinator)
        except Refused as error:
            wrong.append(str(error))
    if not 0 < args.process_timeout <= 86400:
        wrong.append(f"--process-timeout is {args.process_timeout:g}; it is a number of seconds, up to a day")
    return wrong


def add_device_flags(p: argparse.ArgumentParser) -> None:
    """The flags that say which processes and devices share the work; `mesh_of` reads the latter."""
    add_process_flags(p.add_argument_group("several processes, each with its own devices"))
    add_mesh_flags(p.add_argument_group("mesh (default: one process takes few devices, several all, on fsdp)"))


def mesh_of(arguments: argparse.Namespace) -> Any:
    """The mesh that the flags name, the rest of the devices on fsdp; None where one process is given none of them."""
    import jax

    from gt_jax.devices.sharding import make_mesh

    given = {axis: getattr(arguments, f"mesh_{axis}") for axis in MESH_AXES}
    if not is_distributed(arguments) and all(size is None for size in given.values()):
        return None
    devices = jax.devices()
    sizes = {"data": slice_count(devices), "expert": 1, "tensor": 1}
    sizes |= {axis: size for axis, size in given.items() if size is not None}
    rest = max(len(devices) // max(sizes["data"] * sizes["expert"] * sizes["tensor"], 1), 1)
    return make_mesh(sizes["data"], sizes.get("fsdp", rest), sizes["expert"], sizes["tensor"])
