"""Which meshes are worth a try: those that cut the model evenly, by an estimate of what a step costs a device.

With D parameters outside the experts and E in them, A of all that a token meets, T tokens a device and step, n parts,
L layers of width d, in bytes received (a FLOP counts as a thousandth of a byte, about what a TPU does of both):

    weights gathered and gradients scattered    3 n 2 (D / tensor + E / (tensor expert)) (1 - 1 / fsdp)
    sums over `tensor` and `expert`             6 L 4 T d (1 - 1 / (tensor expert))
    products, again in the backward pass        8 T A / tensor / 1000

Tokens are not cut over `expert`: what is outside the experts is computed again on each of its devices.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from gt_jax.devices.sharding import MESH_AXES, Rules
from gt_jax.training.ahead_of_time import Job
from gt_jax.training.divisibility import indivisible_fields

TOKENS = 16384  # of a part on one device, at most: more only adds memory, fewer send weights more often


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh by its sizes, the parts of a batch, and the estimate in bytes."""

    sizes: dict[str, int]
    accumulate: int
    cost: float


def candidates(job: Job, devices: int, parameters: int) -> list[Candidate]:
    """Meshes on which the model and a part of the batch divide evenly, the cheapest first.

    `tensor` and `expert` are powers of two up to 8, one of them above 1 if there are experts, so that no device
    gathers all of them; `data` is what 256 devices on `fsdp` leave. `accumulate` of the job, if above 1, is kept.
    """
    found = []
    for tensor, expert in itertools.product((1, 2, 4, 8), repeat=2):
        rest, odd = divmod(devices, tensor * expert)
        if odd or (expert > 1 if job.model.moe is None else expert * tensor == 1 < devices):
            continue
        fsdp = math.gcd(rest, 256)
        sizes = dict(zip(MESH_AXES, (rest // fsdp, fsdp, expert, tensor), strict=True))
        parts = parts_of(job, rest)
        if parts and not indivisible_fields(job.model, job.batch // parts, sizes, Rules()):
            found.append(Candidate(sizes, parts, cost(job, sizes, parts, parameters)))
    return sorted(found, key=lambda c: c.cost)


def parts_of(job: Job, shards: int) -> int:
    """The fewest parts with at most `TOKENS` tokens a device, each whole rows of every device; 0 if there are none."""
    if job.batch % shards:
        return 0
    rows = job.batch // shards
    if job.accumulate > 1:
        return job.accumulate if rows % job.accumulate == 0 else 0
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n * job.sequence <= TOKENS]
    return fitting[0] if fitting else rows


def cost(job: Job, sizes: dict[str, int], parts: int, parameters: int) -> float:
    """The estimate above, in bytes."""
    moe, layers, width = job.model.moe, len(job.model.depth), job.model.width
    experts = 0 if moe is None else 3 * layers * moe.experts * width * moe.expert_width
    met = parameters - experts * (1 if moe is None else 1 - moe.top_k * moe.real_share / moe.experts)
    tensor, split = sizes["tensor"], sizes["tensor"] * sizes["expert"]
    tokens = job.batch * job.sequence / (sizes["data"] * sizes["fsdp"])
    weights = 6 * parts * ((parameters - experts) / tensor + experts / split) * (1 - 1 / sizes["fsdp"])
    sums = 24 * layers * tokens * width * (1 - 1 / split)
    return weights + sums + 8 * tokens * met / tensor / 1000
