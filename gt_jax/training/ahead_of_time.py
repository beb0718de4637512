"""The training step, compiled for a mesh of devices that need not be there, and what it costs."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.run import TrainConfig
from gt_jax.devices.meshes import slice_count
from gt_jax.devices.pods import hlo
from gt_jax.devices.pods.between_slices import received
from gt_jax.devices.pods.collectives import Links, collectives, gathers, largest
from gt_jax.devices.pods.hbm_traffic import hbm_traffic
from gt_jax.devices.pods.launches import count_launches
from gt_jax.devices.pods.program_flops import count_flops, is_kernel
from gt_jax.devices.sharding import Rules, with_mesh_devices
from gt_jax.models.language_model import abstract
from gt_jax.training.loop import make_trainer
from gt_jax.training.state import TrainState
from gt_jax.training.step_parts import by_part
from gt_jax.typing import Tree

MIB = 1 << 20
REPLICATED = 64 * MIB  # bytes of a tensor that every device may hold whole
_PASS = re.compile(r"[/.]one_pass/cond$")  # around a pass of an adaptive layer, which runs where somebody needs it
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED.*\bHBM\b", re.IGNORECASE)  # other memory is a kernel's
_NEEDED = re.compile(r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)|"
                     r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained: the model, the rows and tokens of a batch, in how many parts it runs."""

    model: ModelConfig
    batch: int
    sequence: int
    accumulate: int = 1


def lower(job: Job, rules: Rules) -> tuple[TrainState, Any]:
    """(shapes and places of all that a run carries, the step as a run jits it, lowered) for the mesh in context."""
    trainer = make_trainer(job.model, TrainConfig(accumulate=job.accumulate), rules)
    shapes = jax.eval_shape(trainer.new_state, abstract(job.model, rules))
    state = TrainState(*jax.tree.map(with_mesh_devices, tuple(shapes)))
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), rules.spec("batch", None))
    tokens = jax.ShapeDtypeStruct((job.batch, job.sequence), jnp.int32, sharding=sharding)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids"), tokens)
    step: Any = trainer.step
    return state, step.lower(state, batch)


def compile_step(
    job: Job, mesh: jax.sharding.Mesh, memory: int, rules: Rules | None = None,
    link_seconds: Callable[[Sequence[int]], float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compile the step for `mesh` and measure it: a JSON object; `fits` is False where a device has less `memory`.

    Bytes and FLOPs are those of one device and step, every loop counted as often as it runs; `bytes` are those to and
    from HBM, `links` those received from other devices, `launches` what a GPU executes. `link_seconds(group)` is the
    time of a byte that each device of a group receives. Where it does not fit, `short_by` says by how much, if the
    compiler does. `device_rows` are those of a device at a time. An adaptive step counts with all its passes; what it
    costs with one in each layer is `one_pass`, and lies on a line with that. Raises `jax.errors.JaxRuntimeError` for
    what the compiler refuses otherwise.
    """
    rules = rules or Rules()
    with jax.set_mesh(mesh):
        start = time.monotonic()
        state, lowered = lower(job, rules)
        middle = time.monotonic()
        rows = job.batch // (job.accumulate * rules.shards("batch"))
        found: dict[str, Any] = {"mesh": dict(mesh.shape), "accumulate": job.accumulate, "device_rows": rows,
                                 "remat": job.model.remat}
        found |= {"replicated": replicated(state._asdict()), "state": device_bytes(state)}
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            found |= {"fits": False, "error": str(error).splitlines()[0]} | shortage(str(error))
            compiled = None
        found |= {"seconds_lowering": round(middle - start, 1)}
        found |= {"seconds_compiling": round(time.monotonic() - middle, 1)}
    gpu = mesh.devices.flat[0].platform == "gpu"
    slices = slice_count(mesh.devices.flat)
    return found if compiled is None else found | measured(compiled, job, memory, link_seconds, gpu, slices)


def measured(
    compiled: Any, job: Job, memory: int, link_seconds: Callable[[Sequence[int]], float] | None = None,
    gpu: bool = False, slices: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Memory, work and communication of a compiled step, of one device."""
    stats, program = compiled.memory_analysis(), hlo.read(compiled.as_text())
    work, links = count_flops(program), Links(program, link_seconds)
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    total = sum(parts.values())
    return {
        "fits": total <= memory,
        **({"short_by": total - memory} if total > memory else {}),
        "memory": {**parts, "total": total, "of": memory, "free_share": round(1 - total / memory, 3)},
        **_costs(program, links),
        "flops_of_kernels": work.of_kernels,
        **({"between_slices": received(program)} if slices > 1 else {}),
        **one_pass(program, job.model, link_seconds),
        "parts": by_part(program, links, gpu),
        **({"launches": count_launches(program)} if gpu else {}),
        "kernels": sum(is_kernel(i) for i, _ in program.executed()),
        "silent_kernels": work.silent_kernels,
        "collectives": collectives(links),
        "loops_counted_once": program.unknown_loops,
        "largest": largest(program),
        "whole_stacks": stack_gathers(program, job.model),
    }


def _costs(program: hlo.Program, links: Links) -> dict[str, Any]:
    found = {"flops": count_flops(program).flops, "bytes": hbm_traffic(program).bytes, "links": links.received}
    return found | ({} if links.seconds is None else {"link_seconds": links.least_seconds})


def one_pass(
    program: hlo.Program, model: ModelConfig, link_seconds: Callable[[Sequence[int]], float] | None
) -> dict[str, Any]:  # fmt: skip
    """{"one_pass": what the step costs where each layer runs one of "of" passes}; {} of a model that cannot say.

    A pass that no token of the batch needs is not run. Under `context` "alive" passes have any length: nothing is said.
    """
    if model.adaptive is None or model.adaptive.context == "alive":
        return {}
    passes = model.adaptive.max_passes
    rare = dataclasses.replace(program, taken=lambda x: 1 / passes if _PASS.search(x.source) else None)
    return {"one_pass": {"of": passes, **_costs(rare, Links(rare, link_seconds))}}


def shortage(message: str) -> dict[str, int]:
    """Bytes that a device would need and has, in the compiler's words (17.91G are GiB); {} where it does not say."""
    if (found := _NEEDED.search(message)) is None:
        return {}
    needed, available = (_bytes(size) for size in found.groups() if size is not None)
    return {"needed": needed, "available": available, "short_by": needed - available}


def _bytes(size: str) -> int:
    unit = 1 << 10 * (" KMGT".find(size[-1]) if size[-1].isalpha() else 0)
    return round(float(size.rstrip("KMGT")) * unit)


def device_bytes(state: Tree) -> int:
    """What the arrays of a state take of one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))


def replicated(state: Tree) -> list[dict[str, Any]]:
    """The tensors above `REPLICATED` bytes that every device holds whole."""
    rows = []
    for path, leaf in flatten(state).items():
        whole = math.prod(leaf.shape) * leaf.dtype.itemsize
        shards = leaf.sharding.shard_shape(leaf.shape)
        if whole > REPLICATED and tuple(shards) == tuple(leaf.shape) and leaf.sharding.num_devices > 1:
            rows.append({"path": path, "bytes": whole})
    return rows


def stack_gathers(program: hlo.Program, model: ModelConfig) -> list[str]:
    """The all-gathers above `REPLICATED` bytes of a weight of all layers of a segment at once; there should be none.

    A layer gathers its own weights where it uses them, its experts too.
    """
    leaves = flatten(abstract(model)["params"]).items()
    stacks = [_without_ones(leaf.shape) for path, leaf in leaves if path.startswith("segment") and leaf.shape[0] > 1]
    found = ((i.source, one) for i in gathers(program) for one in i.arrays)
    large = [(source, _without_ones(one.shape)) for source, one in found if one.bytes > REPLICATED]
    return sorted({source for source, shape in large if any(_is_stack(shape, stack) for stack in stacks)})


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(d for d in shape if d > 1)


def _is_stack(shape: tuple[int, ...], stack: tuple[int, ...]) -> bool:
    """Whether it is that stack, whole along the layers; other axes may be cut."""
    alike = len(shape) == len(stack) and shape[0] == stack[0]
    return alike and all(whole % part == 0 for part, whole in zip(shape, stack, strict=True))
