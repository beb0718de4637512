"""What a program that runs on several slices receives over the network between them (DCN), and what that takes.

XLA for TPU cuts a collective over devices of several slices in two: what stays in a slice is a collective of its own,
over links; between slices each device hands its share to the host and takes the result back, by a `send` and a `recv`
that name the kind of exchange. Of an exchange among n slices a device receives

    ALL_REDUCE      2 (n - 1) / n of its result, as a reduce-scatter and an all-gather would
    ALL_GATHER      (n - 1) / n of its result
    REDUCE_SCATTER  (n - 1) times its result
    others          its result

    seconds = received * devices of a chip / rate of a chip

Source of the rates: "How to Scale Your Model", part 2 (jax-ml.github.io/scaling-book): 2.5e10 bytes/s a host of four
chips of v5p or eight of v5e, one way; 1.25e10 a chip of v6e and 7x. Assumed: one exchange at a time, all hosts at once.
"""

from __future__ import annotations

import re

from gt_jax.devices.pods.hlo import Computation, Instruction, Program

RATES = {"v5e": 3.125e9, "v5p": 6.25e9, "v6e": 1.25e10, "tpu7x": 1.25e10}  # bytes/s of one chip in one direction

_HANDLER = 'xla_host_transfer_handler_name="xla_megascale_runtime"'
_KIND = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}')


def received(program: Program) -> int:
    """Bytes that one device receives from other slices in one run of a program."""
    return round(program.total(_cost))


def _cost(here: Computation, x: Instruction) -> int:
    if x.opcode != "recv" or _HANDLER not in x.attributes:
        return 0
    result, kind, slices = x.arrays[0].bytes, _KIND.search(x.attributes), _SLICES.search(x.attributes)
    if kind is None or slices is None:
        return result
    n = _count(slices[1])
    shares = {"ALL_REDUCE": 2 * (n - 1) / n, "ALL_GATHER": (n - 1) / n, "REDUCE_SCATTER": n - 1}
    return round(result * shares.get(kind[1], 1))


def _count(numbers: str) -> int:
    """Of `1,2` or `1:4` or both: how many they are."""
    ends = ([int(end) for end in part.split(":")] for part in numbers.split(","))
    return sum(one[-1] - one[0] + 1 for one in ends)
