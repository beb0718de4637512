"""`python -m gt_jax.plan_pod --preset 8b --topology v5p:4x4x4`: does the training step compile and fit on a pod?

Compiles the real step (donated state, the kernels a TPU would run) for a topology, on a machine without a TPU, and
prints memory, work and communication of one device. Without --mesh it tries the most sensible ones. Needs the TPU's
compiler: pip install 'gt-jax[tpu]'.

Exit code 0 when it fits, 1 when it does not, 2 when the request makes no sense.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from typing import Any, get_args

from gt_jax.errors import Refused, refuse_all, run_command, say
from gt_jax.files import local_path
from gt_jax.options import whole

GIB, MIB = 1 << 30, 1 << 20
TOKENS = 1 << 19  # of a batch, where no --batch is given


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from gt_jax.configs.model import Remat

    p = argparse.ArgumentParser(prog="python -m gt_jax.plan_pod", description="Compile the training step for a pod.")
    p.add_argument("--preset", default="8b", help="the model; see python -m gt_jax.describe --help")
    p.add_argument("--model", type=local_path, metavar="FILE", help="JSON of config fields that differ from the preset")
    p.add_argument("--remat", choices=get_args(Remat), help="what the backward pass computes again")
    p.add_argument("--topology", required=True, help="v5e, v5p, v6e or tpu7x and its shape, for example v5p:4x4x4")
    p.add_argument("--mesh", help="sizes of the axes, for example data=1,fsdp=16,tensor=4; the others are 1")
    p.add_argument("--batch", type=whole, help="rows a step (default: half a million tokens)")
    p.add_argument("--sequence-length", type=whole, default=4096)
    p.add_argument("--accumulate", type=whole, default=1, metavar="N", help="run each batch in N parts")
    p.add_argument("--tries", type=whole, default=2, metavar="N", help="meshes to compile where none is given (2)")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return p


def mesh_sizes(text: str, devices: int) -> dict[str, int]:
    """`fsdp=16,tensor=4` as sizes of all four axes; raises `Refused` for other words or another number of devices."""
    from gt_jax.devices.sharding import MESH_AXES

    sizes: dict[str, int] = {}
    wrong = []
    for part in text.split(","):
        axis, _, number = part.partition("=")
        if axis not in MESH_AXES or not re.fullmatch("0*[1-9][0-9]{0,8}", number):
            wrong.append(f"--mesh has {part!r}; it must be AXIS=SIZE with axes {', '.join(MESH_AXES)}")
        elif axis in sizes:
            wrong.append(f"--mesh has {axis} twice")
        else:
            sizes[axis] = int(number)
    refuse_all(wrong, "this is no mesh:")
    sizes = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    product = math.prod(sizes.values())
    if product != devices:
        raise Refused(f"--mesh {text} is for {product} devices; the topology has {devices}, so the sizes must multiply "
                      f"to {devices}")  # fmt: skip
    return sizes


def job_of(arguments: argparse.Namespace) -> Any:
    """The model and the batch that the words name."""
    from gt_jax.configs.json_config import changed_by_file
    from gt_jax.configs.presets import preset
    from gt_jax.training.ahead_of_time import Job

    model = preset(arguments.preset)
    if arguments.model is not None:
        model = changed_by_file(model, arguments.model)
    if arguments.remat is not None:
        model = model.replace(remat=arguments.remat)
    length = arguments.sequence_length
    batch = arguments.batch if arguments.batch is not None else max(1, TOKENS // max(length, 1))
    wrong = [f"--{name} is {value}; it must be at least 1" for name, value in
             (("batch", batch), ("sequence-length", length), ("accumulate", arguments.accumulate),
              ("tries", arguments.tries)) if value < 1]  # fmt: skip
    if not wrong and batch % arguments.accumulate:
        wrong = [f"--batch {batch} is not divisible by --accumulate {arguments.accumulate}"]
    refuse_all(wrong, "these do not fit:")
    return Job(model, batch, length, arguments.accumulate)


def chosen(arguments: argparse.Namespace, job: Any, devices: int) -> list[tuple[dict[str, int], int]]:
    """(sizes of the mesh, parts of the batch) to compile for; raises `Refused` where nothing divides."""
    from gt_jax.devices.sharding import Rules
    from gt_jax.training import mesh_search
    from gt_jax.training.divisibility import refuse_indivisible

    if arguments.mesh is not None:
        sizes = mesh_sizes(arguments.mesh, devices)
        heading = f"--mesh {arguments.mesh} does not cut the model evenly:"
        refuse_indivisible(job.model, job.batch // job.accumulate, sizes, heading, Rules())
        return [(sizes, job.accumulate)]
    found = mesh_search.candidates(job, devices, parameters_of(job.model))
    if not found:
        whole = dataclasses.replace(job, batch=devices * job.accumulate)
        divides = mesh_search.candidates(whole, devices, 1)
        other = f"--batch {whole.batch}, or a multiple of it, has one" if divides else \
            "neither does any other batch: name one with --mesh, to see what it does not divide"  # fmt: skip
        raise Refused(f"no mesh of {devices} devices divides batch {job.batch} and the model evenly; {other}")
    return [(one.sizes, one.accumulate) for one in found[: arguments.tries]]


def parameters_of(model: Any) -> int:
    """How many numbers are trained."""
    import jax

    from gt_jax.models.language_model import abstract

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(model)["params"]))


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile for each mesh: {"topology", "devices", "parameters", "tried": [...]}, what fits first."""
    from gt_jax.devices.pods import topologies
    from gt_jax.devices.sharding import make_mesh
    from gt_jax.training.ahead_of_time import Job, compile_step

    topology = topologies.parse(arguments.topology)
    job = job_of(arguments)
    devices = topologies.devices_of(topology)
    tried = []
    for sizes, parts in chosen(arguments, job, len(devices)):
        words = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        say(f"compiling for {topology.name}: {words}, batch in {parts} part(s)")
        mesh = make_mesh(**sizes, devices=devices)
        one = Job(job.model, job.batch, job.sequence, parts)
        row = compile_step(one, mesh, topology.chip.device_memory)
        tried.append(row | least_seconds(row, topology.chip, devices[0].device_kind))
    tried.sort(key=lambda row: (not row["fits"], -_free(row)))
    return {
        "preset": arguments.preset, "topology": topology.name, "devices": len(devices),
        "devices_a_chip": topology.chip.devices, "parameters": parameters_of(job.model), "batch": job.batch,
        "sequence_length": job.sequence, "tried": tried,
    }  # fmt: skip


def _free(row: dict[str, Any]) -> float:
    """Bytes that are left, below 0 those that are missing."""
    memory = row.get("memory")
    return -row.get("short_by", math.inf) if memory is None else memory["of"] - memory["total"]


def least_seconds(row: dict[str, Any], chip: Any, device_kind: str) -> dict[str, Any]:
    """{"least_seconds": of a step, by "flops" at the bfloat16 peak and by "bytes" at HBM's}, {} where it did not fit.

    What is sent between devices has no bound here: no published rate says what a collective gets of the links.
    """
    from gt_jax.models.flops import peak_flops

    peak = peak_flops(device_kind)
    if "flops" not in row or peak is None:
        return {}
    return {"least_seconds": {"flops": row["flops"] / peak, "bytes": row["bytes"] * chip.devices / chip.bandwidth}}


def report_lines(result: dict[str, Any]) -> list[str]:
    """The result for a reader."""
    lines = [f"{result['preset']}: {result['parameters']:,} parameters on {result['topology']}, {result['devices']} "
             f"devices; {result['batch']} rows of {result['sequence_length']} tokens a step"]  # fmt: skip
    for row in result["tried"]:
        lines += ["", *_mesh_lines(row)]
    return lines


def _mesh_lines(row: dict[str, Any]) -> list[str]:
    sizes = ",".join(f"{axis}={size}" for axis, size in row["mesh"].items())
    lines = [f"--mesh {sizes} --accumulate {row['accumulate']}: {'fits' if row['fits'] else 'DOES NOT FIT'}"]
    lines.append(f"  compiled in {row['seconds_compiling']:.0f} s, lowered in {row['seconds_lowering']:.0f} s")
    lines += [f"  every device holds all of {one['path']}, {one['bytes'] / MIB:.0f} MiB" for one in row["replicated"]]
    if "memory" not in row:
        return [*lines, f"  {row['error']}", *advice(row)]
    memory = row["memory"]
    parts = ", ".join(f"{name} {memory[name] / GIB:.2f}" for name in ("arguments", "temporaries", "outputs", "program"))
    lines.append(f"  memory of a device, GiB: {parts}; together {memory['total'] / GIB:.2f} "
                 f"of {memory['of'] / GIB:.0f}, {memory['free_share']:.0%} free")  # fmt: skip
    lines += _work_lines(row)
    for kind, sums in sorted(row["collectives"].items()):
        lines.append(f"  {kind}: {sums['count']} a step, {sums['bytes'] / GIB:.2f} GiB")
    lines += [f"  gathers all experts of a layer: {source}" for source in row["whole_expert_stacks"]]
    lines.append("  largest arrays:")
    lines += [f"    {one['bytes'] / MIB:7.0f} MiB {one['shape']}  {one['source'][-90:]}" for one in row["largest"][:6]]
    return lines + ([] if row["fits"] else advice(row))


def _work_lines(row: dict[str, Any]) -> list[str]:
    """FLOPs and bytes of a step, the time that they take at least, and what they do not count."""
    least = row.get("least_seconds")
    by_flops, by_bytes = ("" if least is None else f", at least {least[name]:.3g} s" for name in ("flops", "bytes"))
    lines = [
        f"  work of a device in a step: {row['flops']:.3g} FLOP of matrix products{by_flops}; "
        f"{row['bytes'] / GIB:.3g} GiB to and from HBM{by_bytes}",
        f"  {row['kernels']} kernels in the program, {row['flops_of_kernels']:.3g} of the FLOP",
    ]
    if row["loops_counted_once"]:
        lines.append(f"  {row['loops_counted_once']} loops of unknown length are counted as if they ran once")
    return lines


def advice(row: dict[str, Any]) -> list[str]:
    """What would help a step that does not fit."""
    has = row["memory"]["of"] if "memory" in row else row.get("available")
    lines = []
    if "short_by" in row:
        lines.append(f"  {row['short_by'] / GIB:.2f} GiB too much")
    if has is not None and row["state"] > has / 2:
        lines.append(f"  the state alone takes {row['state'] / GIB:.2f} GiB, more than half: more devices on fsdp, "
                     "tensor or expert")  # fmt: skip
    else:
        parts = 2 * row["accumulate"]
        lines.append(f"  what would help: --accumulate {parts}, more devices, or --remat layer")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and report; 0 if a mesh fits, 1 if none does."""
    arguments = parser().parse_args(argv)
    if importlib.util.find_spec("libtpu") is None:
        raise Refused("the TPU compiler is not installed: pip install 'gt-jax[tpu]'")
    from gt_jax.devices.pods.topologies import parse, use_compiler

    parse(arguments.topology)
    use_compiler()  # before JAX is imported
    result = plan(arguments)
    print(json.dumps(result) if arguments.json else "\n".join(report_lines(result)))
    return 0 if any(row["fits"] for row in result["tried"]) else 1


if __name__ == "__main__":
    run_command(main)
