"""What is fixed when the Hopper kernels are compiled: widths, how many bfloat16 parts a value has, and what fits.

A product of the matrix unit takes bfloat16 and sums in float32. What needs more bits than that is a sum of two
bfloat16 *parts*, x = high + low to 2^-17 of x, and a product of two such values takes three passes (low times low is
left out). Which values have two parts:

    plain    none: beta at most 1 and bfloat16 tokens
    fine     the state, the inverse, what is solved and written: for beta above 1, where the inverse cancels
    exact    the tokens too: float32 tokens
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

C = 64  # tokens of a chunk, and value columns of a block: one tile of the matrix unit
SLAB = 128  # most key columns that one operand has
WIDEST = 256
SHARED_MEMORY = 232_448  # bytes a block may have on compute capability 9.0
_RESERVED = 2_048  # barriers, alignment, scratch of reductions
_TILE = C * C * 2  # bytes of a bfloat16 tile


@dataclass(frozen=True)
class Plan:
    """Widths are padded to whole tiles; `key_width` is cut into slabs of at most 128 columns."""

    key_width: int
    value_width: int
    group: int  # value heads a key head
    scale: float
    fine: bool
    exact: bool
    segmented: bool
    interpreted: bool
    stages: int = 1  # chunks whose keys, values and inverses are in shared memory
    read_stages: int = 1  # chunks whose queries and scores are
    written_stages: int = 1  # chunks whose U is
    back_stages: int = 1  # chunks of the walk back
    gradient_stages: int = 1  # tiles of 64 value columns of the gradients

    @property
    def slabs(self) -> tuple[int, ...]:
        width = min(self.key_width, SLAB)
        return (width,) * (self.key_width // width)

    @property
    def value_tiles(self) -> int:
        return self.value_width // C

    @property
    def parts(self) -> int:
        """Of states, inverses and scores."""
        return 2 if self.fine or self.exact else 1

    @property
    def token_parts(self) -> int:
        return 2 if self.exact else 1


def padded_key_width(width: int) -> int:
    """64, or whole slabs."""
    return C if width <= C else width + -width % SLAB


def padded_value_width(width: int) -> int:
    """The next whole number of tiles."""
    return width + -width % C


def _vectors(*counts: int) -> int:
    """Shared memory of vectors of a chunk's tokens: each allocation starts at a multiple of 1,024 bytes."""
    return sum(4 * C * count + -(4 * C * count) % 1024 for count in counts)


def inside_bytes(plan: Plan) -> int:
    """Shared memory of a block of `inside`: K and Q, then L in two parts, and X."""
    tiles = 2 * plan.token_parts * plan.key_width * C * 2 + (2 + plan.parts) * _TILE
    return tiles + _vectors(2, 1, 1) + _RESERVED


def across_bytes(plan: Plan) -> int:
    """Shared memory of a block of `across`, for the stages of the plan."""
    key = plan.key_width * C * 2
    stage = plan.token_parts * (key + _TILE) + plan.parts * _TILE
    read = plan.token_parts * key + plan.parts * _TILE
    once = plan.parts * key + (1 + plan.token_parts) * _TILE  # the state, the identity, the output
    tiles = plan.stages * stage + plan.read_stages * read + plan.written_stages * plan.parts * _TILE + once
    return tiles + _vectors(3 * plan.stages, plan.read_stages) + _RESERVED


def back_bytes(plan: Plan) -> int:
    """Shared memory of a block of `back`, for the stages of the plan."""
    key = plan.key_width * C * 2
    stage = plan.token_parts * (2 * key + _TILE) + 2 * plan.parts * _TILE
    tiles = plan.back_stages * stage + plan.parts * (key + _TILE) + _TILE
    return tiles + _vectors(3 * plan.back_stages) + _RESERVED


def gradient_bytes(plan: Plan) -> int:
    """Shared memory of a block of `gradients`, for the stages of the plan."""
    key, slab = plan.key_width * C * 2, plan.slabs[0] * C * 2
    stage = plan.token_parts * 2 * _TILE + plan.parts * (_TILE + key + slab)
    once = plan.token_parts * (slab + key) + plan.parts * 4 * _TILE + 2 * plan.token_parts * _TILE
    return plan.gradient_stages * stage + once + _vectors(3, 2, 1, 5, 1) + _RESERVED


def with_stages(plan: Plan) -> Plan:
    """The plan with the deepest rings that fit; with one of each where nothing does."""
    for stages, read, written in ((3, 2, 2), (2, 2, 2), (2, 1, 2), (2, 1, 1), (1, 1, 1)):
        plan = dataclasses.replace(plan, stages=stages, read_stages=read, written_stages=written)
        if across_bytes(plan) <= SHARED_MEMORY:
            break
    for stages in (3, 2, 1):
        plan = dataclasses.replace(plan, back_stages=stages)
        if back_bytes(plan) <= SHARED_MEMORY:
            break
    for stages in range(min(2, plan.value_tiles), 0, -1):
        plan = dataclasses.replace(plan, gradient_stages=stages)
        if gradient_bytes(plan) <= SHARED_MEMORY:
            break
    return plan


def has_backward(plan: Plan) -> bool:
    """Whether there are kernels for the backward pass; else XLA goes back from what the forward kernels saved."""
    compiles = plan.parts == 1 and len(plan.slabs) == 1
    return compiles and max(back_bytes(plan), gradient_bytes(plan)) <= SHARED_MEMORY


def too_large(plan: Plan) -> list[str]:
    """Which kernel needs more shared memory than a block can have, in words."""
    return [
        f"{name} needs {needed:,} bytes of shared memory for k padded to {plan.key_width} and v to "
        f"{plan.value_width}{' in float32' if plan.exact else ''}, a block has {SHARED_MEMORY:,}: narrower heads"
        f"{', or bfloat16,' if plan.exact else ''} would fit"
        for name, needed in (("inside", inside_bytes(plan)), ("across", across_bytes(plan)))
        if needed > SHARED_MEMORY
    ]
