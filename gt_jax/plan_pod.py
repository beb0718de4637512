"""`python -m gt_jax.plan_pod --preset 8b --topology v5p:4x4x4`: does the training step compile and fit on a pod?

    python -m gt_jax.plan_pod --preset 8b --topology v5p:4x4x4 --json > plan.json
    python -m gt_jax.plan_pod --preset small --topology h100:8
    python -m gt_jax.plan_pod before.json after.json                                # part by part

Compiles the real step (donated state, the kernels that would run there) for a topology, on a machine without it, and
prints memory, work and communication of one device, by part of the model too. Without --mesh it tries those that seem
fastest. Needs that compiler: pip install 'gt-jax[tpu]' or 'gt-jax[cuda]'. Stored plans are shown without it.

Exit code 0 when it fits, 1 when it does not, 2 when the request makes no sense.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from gt_jax.devices.meshes import MESH_AXES
from gt_jax.devices.pods.gpus import PREALLOCATED
from gt_jax.errors import Refused, deliver, refuse_all, run_command, say
from gt_jax.files import local_path
from gt_jax.monitoring.picture_file import refuse_picture, write_picture
from gt_jax.options import whole
from gt_jax.training.pod_plans import (
    comparison_lines,
    heading,
    is_old,
    least_by_part,
    part_lines,
    parts,
    pod_name,
    read_plan,
    refuse_other,
)

GIB, MIB = 1 << 30, 1 << 20
BOUNDS = {"flops": "arithmetic", "bytes": "HBM", "links": "links", "between_slices": "the network between slices"}
TOKENS = 1 << 19  # of a batch, where no --batch is given


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from gt_jax.configs.model import Remat

    p = argparse.ArgumentParser(prog="python -m gt_jax.plan_pod", description="Compile the training step for a pod.")
    p.add_argument("--preset", default="8b", help="the model; see python -m gt_jax.describe --help")
    p.add_argument("--model", type=local_path, metavar="FILE", help="JSON of config fields that differ from the preset")
    p.add_argument("--remat", choices=get_args(Remat), help="what the backward pass computes again")
    p.add_argument("plans", type=local_path, nargs="*", metavar="PLAN.json", help="show a stored plan, or compare two")
    p.add_argument("--topology", help="v5e, v5p, v6e or tpu7x and its shape, for example v5p:4x4x4; h100 or "
                   "h200 and how many, for example h100:8")
    p.add_argument("--slices", type=whole, default=1, metavar="N", help="so many pods of that shape, which a network "
                   "joins; `data` goes over it (1)")
    p.add_argument("--mesh", help="sizes of the axes, for example data=1,fsdp=16,tensor=4; the others are 1")
    p.add_argument("--batch", type=whole, help="rows a step (default: half a million tokens)")
    p.add_argument("--sequence-length", type=whole, default=4096)
    p.add_argument("--accumulate", type=whole, metavar="N", help="run each batch in N parts (1; without --mesh as "
                   "many as seem to fit)")  # fmt: skip
    p.add_argument("--tries", type=whole, default=2, metavar="N", help="meshes to compile where none is given (2)")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    p.add_argument("--picture", type=local_path, metavar="FILE.png", help="draw the least times by part")
    return p


def mesh_sizes(text: str, devices: int) -> dict[str, int]:
    """`fsdp=16,tensor=4` as sizes of all four axes; raises `Refused` for other words or another number of devices."""
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
    from gt_jax.configs.json_config import changed_by_file, refuse_overruled
    from gt_jax.configs.presets import preset
    from gt_jax.training.ahead_of_time import Job

    model = preset(arguments.preset)
    if arguments.model is not None:
        model = changed_by_file(model, arguments.model)
    if arguments.remat is not None:
        refuse_overruled(arguments.model, {f"--remat {arguments.remat}": {"remat": arguments.remat}})
        model = model.replace(remat=arguments.remat)
    length = arguments.sequence_length
    batch = arguments.batch if arguments.batch is not None else max(1, TOKENS // max(length, 1))
    parts = 1 if arguments.accumulate is None else arguments.accumulate
    wrong = [f"--{name} is {value}; it must be at least 1" for name, value in
             (("batch", batch), ("sequence-length", length), ("accumulate", parts),
              ("tries", arguments.tries)) if value < 1]  # fmt: skip
    if not wrong and batch % parts:
        wrong = [f"--batch {batch} is not divisible by --accumulate {parts}"]
    refuse_all(wrong, "these do not fit:")
    return Job(model, batch, length, parts)


def chosen(
    arguments: argparse.Namespace, job: Any, devices: int, machine: Any
) -> list[tuple[dict[str, int], int, dict[str, float]]]:
    """(sizes of the mesh, parts of the batch, estimated seconds) to compile for; raises `Refused` where none divides.

    No seconds are estimated of a mesh that is named.
    """
    from gt_jax.devices.sharding import Rules
    from gt_jax.training import mesh_search
    from gt_jax.training.divisibility import refuse_indivisible

    if arguments.mesh is not None:
        sizes = mesh_sizes(arguments.mesh, devices)
        heading = f"--mesh {arguments.mesh} does not cut the model evenly:"
        refuse_indivisible(job.model, job.batch // job.accumulate, sizes, heading, Rules())
        return [(sizes, job.accumulate, {})]
    fixed = arguments.accumulate is not None
    found = mesh_search.candidates(job, devices, parameters_of(job.model), machine, arguments.slices, fixed)
    if not found:
        whole = dataclasses.replace(job, batch=devices * job.accumulate)
        divides = mesh_search.candidates(whole, devices, 1, machine, arguments.slices, fixed)
        other = f"--batch {whole.batch}, or a multiple of it, has one" if divides else \
            "neither does any other batch: name one with --mesh, to see what it does not divide"  # fmt: skip
        raise Refused(f"no mesh of {devices} devices divides batch {job.batch} and the model evenly; {other}")
    return [(one.sizes, one.accumulate, one.seconds) for one in found[: arguments.tries]]


def machine_of(topology: Any, devices: Sequence[Any]) -> Any:
    """What the search of a mesh has to know of a device of this pod."""
    from gt_jax.devices.sharding import make_mesh
    from gt_jax.models.flops import peak_flops
    from gt_jax.training.mesh_search import Machine

    peak = peak_flops(devices[0].device_kind)
    assert peak is not None, devices[0].device_kind

    def links(sizes: Mapping[str, int]) -> dict[str, tuple[float, int]]:
        return topology.axis_rates(make_mesh(**sizes, devices=devices))

    return Machine(peak, topology.bandwidth, topology.device_memory, links)


def parameters_of(model: Any) -> int:
    """How many numbers are trained."""
    import jax

    from gt_jax.models.language_model import abstract

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(model)["params"]))


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile for each mesh: {"topology", "devices", "parameters", "tried": [...]}, what fits first."""
    from gt_jax.configs.json_config import read_object
    from gt_jax.devices.pods import topologies
    from gt_jax.devices.sharding import make_mesh
    from gt_jax.training.ahead_of_time import Job, compile_step

    topology = topologies.parse(arguments.topology, arguments.slices)
    job = job_of(arguments)
    devices = topology.stand_ins()
    slices = f"{arguments.slices} x " if arguments.slices > 1 else ""
    tried = []
    for sizes, number, guess in chosen(arguments, job, len(devices), machine_of(topology, devices)):
        words = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        say(f"compiling for {slices}{topology.name}: {words}, batch in {number} part(s){_estimated(guess)}")
        mesh = make_mesh(**sizes, devices=devices)
        one = Job(job.model, job.batch, job.sequence, number)
        seconds = topology.link_seconds(mesh.devices.flatten().tolist())
        row = compile_step(one, mesh, topology.device_memory, link_seconds=seconds)
        row |= {"estimated_seconds": guess} if guess else {}
        row |= {"assumed": topology.assumed}
        tried.append(row | least_seconds(row, topology.bandwidth, devices[0].device_kind, topology.slice_rate))
    tried.sort(key=lambda row: (not row["fits"], _bound(row), -_free(row)))
    return {
        "changed": ({} if arguments.model is None else read_object(arguments.model, "--model"))
                   | ({} if arguments.remat is None else {"remat": arguments.remat}),
        "preset": arguments.preset, "topology": topology.name, "devices": len(devices),
        **({"slices": arguments.slices} if arguments.slices > 1 else {}),
        "devices_a_chip": topology.a_chip, "parameters": parameters_of(job.model), "batch": job.batch,
        "sequence_length": job.sequence, "tried": tried,
    }  # fmt: skip


def _estimated(seconds: Mapping[str, float]) -> str:
    """Why a mesh was chosen, in words."""
    if not seconds:
        return ""
    each = ", ".join(f"{BOUNDS[name]} {value:.2g}" for name, value in seconds.items())
    return f"; estimated seconds: {each}: bound by {BOUNDS[max(seconds, key=lambda name: seconds[name])]}"


def _free(row: dict[str, Any]) -> float:
    """Bytes that are left, below 0 those that are missing."""
    memory = row.get("memory")
    return -row.get("short_by", math.inf) if memory is None else memory["of"] - memory["total"]


def _bound(row: dict[str, Any]) -> float:
    """The largest of the least times, infinite where there are none."""
    return max(row.get("least_seconds", {"none": math.inf}).values())


def least_seconds(
    row: dict[str, Any], bandwidth: float, device_kind: str, slice_rate: float = math.inf
) -> dict[str, Any]:
    """What a step takes at least: {"least_seconds": {"flops", "bytes", "links"}, "bound"}, {} where it did not fit.

    `flops` at the bfloat16 peak, `bytes` at HBM's `bandwidth`, `links` as the topology has it, of several slices
    `between_slices` at `slice_rate`; `bound` is the largest. A step that hid
    the others wholly behind it would take so long.
    """
    from gt_jax.models.flops import peak_flops

    peak = peak_flops(device_kind)
    if "flops" not in row or peak is None:
        return {}
    least = {"flops": row["flops"] / peak, "bytes": row["bytes"] / bandwidth}
    least |= {"links": row["link_seconds"]} if "link_seconds" in row else {}
    least |= {"between_slices": row["between_slices"] / slice_rate} if "between_slices" in row else {}
    return {"least_seconds": least, "bound": max(least, key=lambda name: least[name])}


def report_lines(result: dict[str, Any]) -> list[str]:
    """The result for a reader."""
    lines = [f"{result['preset']}: {result['parameters']:,} parameters on {pod_name(result)}, {result['devices']} "
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
    if "launches" in row and memory["total"] > PREALLOCATED * memory["of"]:
        lines.append(f"  more than the {PREALLOCATED:.0%} of a GPU that JAX takes by itself: "
                     "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95")  # fmt: skip
    lines += _work_lines(row)
    for kind, sums in sorted(row["collectives"].items()):
        lines.append(f"  {kind}: {sums['count']} a step, results {sums['bytes'] / GIB:.2f} GiB, received over links "
                     f"{sums['received'] / GIB:.2f} GiB")  # fmt: skip
    lines += [f"  gathers a weight of all layers at once: {source}" for source in row["whole_stacks"]]
    lines += ["  by part:", *part_lines(row)]
    lines.append("  largest arrays:")
    lines += [f"    {one['bytes'] / MIB:7.0f} MiB {one['shape']}  {one['source'][-90:]}" for one in row["largest"][:6]]
    return lines + ([] if row["fits"] else advice(row))


def _work_lines(row: dict[str, Any]) -> list[str]:
    """FLOPs and bytes of a step, the time that they take at least, and what they do not count."""
    from gt_jax.devices.pods.links import ASSUMED

    least = row.get("least_seconds", {})
    by_flops, by_bytes, by_links, by_network = (f", at least {least[name]:.3g} s" if name in least else ""
                                                for name in BOUNDS)  # fmt: skip
    between = row.get("between_slices")
    lines = [
        f"  work of a device in a step: {row['flops']:.3g} FLOP of matrix products{by_flops}; "
        f"{row['bytes'] / GIB:.3g} GiB to and from HBM{by_bytes}",
        f"  received over links: {row['links'] / GIB:.3g} GiB{by_links}",
        *([] if between is None else [f"  received from other slices: {between / GIB:.3g} GiB{by_network}"]),
        *([f"  bound by {BOUNDS[row['bound']]}; assumed of links: {row.get('assumed', ASSUMED)}"] if least else []),
        f"  {row['kernels']} kernels in the program, {row['flops_of_kernels']:.3g} of the FLOP",
    ]
    if launches := row.get("launches"):
        lines[-1] = (f"  executed in a step: {launches['kernels']:,} kernels, {launches['copies']:,} of them copies; "
                     f"{launches['conditionals']:,} conditionals, {launches['loops']:,} loops")  # fmt: skip
        silent = f"  {row['silent_kernels']} of our own kernels give no estimate, and are not in the FLOP"
        lines += [silent] if row["silent_kernels"] else []
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
        halves = row.get("device_rows", 2) % 2 == 0  # a stored plan of before does not say
        helps = [f"--accumulate {2 * row['accumulate']}"] if halves else []
        helps += [] if row.get("remat") == "layer" else ["--remat layer"]
        lines.append(f"  what would help: {', '.join([*helps, 'more devices', 'shorter rows'])}")
    return lines


def show(arguments: argparse.Namespace) -> int:
    """A stored plan, or two side by side; raises `Refused` for other files, and for plans of different models."""
    if len(arguments.plans) > 2:
        raise Refused(f"{len(arguments.plans)} plans are named; one is shown, two are compared")
    asked = ("preset", "model", "remat", "topology", "slices", "mesh", "batch", "sequence_length", "accumulate",
             "tries", "json")  # fmt: skip
    defaults = parser()
    if given := [name for name in asked if getattr(arguments, name) != defaults.get_default(name)]:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise Refused(f"stored plans are shown as they are: leave out {flags}")
    plans = {str(path): read_plan(path) for path in arguments.plans}
    if len(plans) < len(arguments.plans):
        raise Refused("a plan is compared with itself; name two")
    if len(plans) == 1:
        ((path, one),) = plans.items()
        old = [f"{path} is an old plan: it has no parts, and its collectives are counted too often"]
        lines = [heading(one), *(old if is_old(one) else part_lines(one["tried"][0]))]
    else:
        refuse_other(plans)
        lines = comparison_lines(plans)
    named = {} if arguments.picture is None else {
        str(arguments.picture): lambda: draw(list(plans.values()), arguments.picture)}  # fmt: skip
    deliver("\n".join(lines), named)
    return 0


def draw(plans: Sequence[dict[str, Any]], path: Path) -> None:
    """The least times of plans by part, three bars each; raises `Refused` for plans without parts."""
    from gt_jax.monitoring.plan_plots import plot_parts

    if any(is_old(plan) for plan in plans):
        raise Refused("there is nothing to draw: an old plan has no parts, and what does not fit has none")
    bars = {f"{name}\n{pod_name(plan)}" + f" {'AB'[number]}" * (len(plans) > 1): least_by_part(plan["tried"][0], key)
            for number, plan in enumerate(plans) for key, name in BOUNDS.items()
            if key != "between_slices"}  # fmt: skip  # which is not known by part
    order = parts([plan["tried"][0] for plan in plans])
    write_picture(lambda image: plot_parts(bars, image, order, heading(plans[0])), path)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and report; 0 if a mesh fits, 1 if none does. Plans that are named are shown, two compared."""
    arguments = parser().parse_args(argv)
    refuse_picture(arguments.picture)
    if arguments.plans:
        return show(arguments)
    if arguments.topology is None:
        raise Refused("--topology is missing, for example --topology v5p:4x4x4; or name a stored plan, or two")
    from gt_jax.devices.pods.topologies import parse

    topology = parse(arguments.topology, arguments.slices)
    if arguments.mesh is not None:  # what is wrong with it needs no compiler
        data = mesh_sizes(arguments.mesh, topology.devices)["data"]
        if data % arguments.slices:
            raise Refused(f"--mesh {arguments.mesh}: data is {data}, which goes from slice to slice; with --slices "
                          f"{arguments.slices} it must be a multiple of {arguments.slices}")  # fmt: skip
    topology.use_compiler()  # before JAX is imported
    result = plan(arguments)
    named = {} if arguments.picture is None else {str(arguments.picture): lambda: draw([result], arguments.picture)}
    deliver(json.dumps(result) if arguments.json else "\n".join(report_lines(result)), named)
    return 0 if any(row["fits"] for row in result["tried"]) else 1


if __name__ == "__main__":
    run_command(main)
