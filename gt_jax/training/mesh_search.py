"""Which meshes are worth a try: those that cut the model evenly, ranked by the largest of three estimated times.

With D parameters outside the experts and E in them, A and B of these that a token meets, T tokens a device and step, n
parts, c chunks of the memory stream in a row, L layers of width d with s streams, W = D / tensor + E / (tensor expert),
b chunks that run backward apart (c, or 1 where a row's chunks run backward together), bytes and FLOP of a device and
step:

    products, again in the backward pass       8 T (A / tensor + B / (tensor expert))
    HBM: weights written and read a pass       n (c + 2 b) 4 W
         streams and activations               2 T L s d (WHOLE + CUT / tensor)
    links: weights gathered, gradients back    n (c + 2 b) 2 W (1 - 1 / fsdp), twice over three axes of the torus
           gradients over `data`               n b 4 W / fsdp (1 - 1 / data)
           sums over `tensor` and `expert`     4 SUMS L T d (1 - 1 / (tensor expert))

- Tokens are not cut over `expert`: what is outside the experts is computed again on each of its devices.
- A layer's weights are gathered whole where it uses them, its experts too: 0.5 GB of the 8B model's.
- WHOLE, CUT and SPACE are fitted to the four plans of `8b` (experiments/results): HBM bytes within a quarter, memory at
  least as much as it is, at most twice; SUMS is of earlier plans. For other models they are guesses.
- The compiler for TPU writes a gather over three axes of the torus as an all-reduce of zeros.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping

from gt_jax.devices.meshes import MESH_AXES
from gt_jax.devices.sharding import Rules
from gt_jax.models.layers.block import replays
from gt_jax.models.memory_chunks import chunk_length
from gt_jax.training.ahead_of_time import Job
from gt_jax.training.divisibility import indivisible_fields

TOKENS = 16384  # of a part on one device, at most: more only adds memory, fewer send weights more often
WHOLE, CUT = 58, 112  # times that a layer reads or writes all streams' bytes: whatever the mesh, and cut over `tensor`
SUMS = 18  # all-reduces of [T, d] a layer
SPACE = 50  # streams of a part that are held at once, beside two of each layer


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device: FLOP/s, bytes/s of HBM, bytes of memory; and of a mesh bytes/s of each axis, links of the torus too.

    `links(sizes)` is {axis: (bytes a second that one device receives along it, axes of the torus it spans)}.
    """

    flops: float
    bandwidth: float
    memory: int
    links: Callable[[Mapping[str, int]], Mapping[str, tuple[float, int]]]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh by its sizes, the parts of a batch, estimated seconds by "flops", "bytes" and "links", and memory."""

    sizes: dict[str, int]
    accumulate: int
    seconds: dict[str, float]
    memory: float

    @property
    def bound(self) -> str:
        """Which of the three takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def cost(self) -> float:
        """The longest, in seconds."""
        return self.seconds[self.bound]


def candidates(
    job: Job, devices: int, parameters: int, machine: Machine, slices: int = 1, fixed: bool = False
) -> list[Candidate]:
    """Meshes on which the model and a part of the batch divide evenly: those that seem to fit, the fastest first.

    `tensor` and `expert` are powers of two up to 8, `fsdp` 16 to 256 where there are as many devices. `accumulate` of
    the job is kept where it is `fixed`, or above 1. `data` is a multiple of `slices`.
    """
    found = []
    for tensor, expert in itertools.product((1, 2, 4, 8), repeat=2):
        rest, odd = divmod(devices, tensor * expert)
        if odd or (expert > 1 and job.model.moe is None):
            continue
        for fsdp in sorted({math.gcd(rest, size) for size in (16, 32, 64, 128, 256)}):
            sizes = dict(zip(MESH_AXES, (rest // fsdp, fsdp, expert, tensor), strict=True))
            if sizes["data"] % slices:
                continue
            tried = [estimate(job, sizes, parts, parameters, machine) for parts in parts_of(job, rest, fixed)
                     if not indivisible_fields(job.model, job.batch // parts, sizes, Rules())]  # fmt: skip
            fitting = [one for one in tried if one.memory <= machine.memory]
            found += (fitting or tried[-1:])[:1]
    return sorted(found, key=lambda c: (c.memory > machine.memory, c.cost, sum(c.seconds.values())))


def parts_of(job: Job, shards: int, fixed: bool = False) -> list[int]:
    """Numbers of parts with at most `TOKENS` tokens a device, each whole rows of every device, the fewest first."""
    if job.batch % shards:
        return []
    rows = job.batch // shards
    if fixed or job.accumulate > 1:
        return [job.accumulate] if rows % job.accumulate == 0 else []
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n * job.sequence <= TOKENS]
    return fitting or [rows]


def estimate(job: Job, sizes: dict[str, int], parts: int, parameters: int, machine: Machine) -> Candidate:
    """The times above, and the memory: 16 bytes a parameter, the streams that are held, one gathered layer."""
    model, (data, fsdp, expert, tensor) = job.model, (sizes[axis] for axis in MESH_AXES)
    moe, layers, width = model.moe, len(model.depth), model.width
    experts = 0 if moe is None else 3 * layers * moe.experts * width * moe.expert_width
    met = 0.0 if moe is None else experts * moe.top_k * moe.real_share / moe.experts
    tokens = job.batch * job.sequence / (data * fsdp)
    weights = (parameters - experts) / tensor + experts / (tensor * expert)
    stream = 2 * tokens * width * (1 if model.hyper is None else model.hyper.streams)
    links = machine.links(sizes)
    forward = parts * (job.sequence // chunk_length(model, job.sequence))
    backward = parts if replays(model) else forward
    moved = forward + 2 * backward
    twice = 2 if links["fsdp"][1] > 2 else 1
    received = {
        "fsdp": 2 * moved * weights * (1 - 1 / fsdp) * twice,
        "data": 4 * backward * weights / fsdp * (1 - 1 / data),
        "tensor": 4 * SUMS * layers * tokens * width * (1 - 1 / tensor),
        "expert": 4 * SUMS / 2 * layers * tokens * width * (1 - 1 / expert),
    }
    seconds = {
        "flops": 8 * tokens * ((parameters - experts) / tensor + met / (tensor * expert)) / machine.flops,
        "bytes": (4 * moved * weights + layers * stream * (WHOLE + CUT / tensor)) / machine.bandwidth,
        "links": sum(size / links[axis][0] for axis, size in received.items()),
    }
    held = stream / parts * (2 * layers + SPACE) + 2 * weights / layers
    return Candidate(sizes, parts, seconds, 16 * weights / fsdp + held)
