"""What a retrofit says of itself at its end: the adaptive model as it lies on the disk, beside its source.

Every byte is read back and compared with its checksums. Both models then run on random tokens: closed gates add
nothing, so the logits have the same bits, or where the two programs sum in another order, differ by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.checkpoints import checkpoint
from gt_jax.devices.sharding import Rules
from gt_jax.errors import Failed, Refused
from gt_jax.evaluation.growth_check import Say, read_back, refuse_no_room
from gt_jax.evaluation.model_files import Checkpoint, open_checkpoint
from gt_jax.models.language_model import LanguageModel, abstract, apply_network

TOKENS = (2, 32)
BOUND = {"float32": 1e-3, "bfloat16": 0.1}  # of the largest logit; what is above it is no rounding of sums


def check_retrofit(source: Path, target: Path, say: Say = lambda line: None) -> dict[str, Any]:
    """Read `target` back, and compare its logits with those of the `source`; JSON values.

    "files" and "bytes" compared; "tokens", "difference" (the largest, of the largest logit) and "same_bits", or
    "not_compared", the reason. Raises `Failed` where the model on the disk is not what was written, or says otherwise.
    """
    say("reading the model back")
    read = read_back(target, "retrofit")
    before, after = open_checkpoint(source), open_checkpoint(target)
    found: dict[str, Any] = {"files": read.checked, "bytes": read.bytes}
    try:
        refuse_no_room(before, after)
        want, got = (_logits(one) for one in (before, after))
    except (Refused, MemoryError) as reason:
        return {**found, "not_compared": str(reason)}
    size = float(np.max(np.abs(want)))
    difference = float(np.max(np.abs(got - want))) / max(size, float(np.finfo(np.float32).tiny))
    if not difference <= BOUND[before.config.compute_dtype]:
        raise Failed(f"{target} does not compute what {source} does: logits differ by {difference:.2e} of their size; "
                     "remove it, and report this")  # fmt: skip
    return {**found, "tokens": int(np.prod(TOKENS)), "difference": difference,
            "same_bits": bool(np.array_equal(got, want))}  # fmt: skip


def _logits(one: Checkpoint) -> np.ndarray:
    """Of random tokens, float32 [b, t, v]."""
    config = one.config
    tokens = np.random.default_rng(0).integers(0, config.vocab, TOKENS)
    variables = checkpoint.load(one.folder, abstract(config), compare=False)
    network = LanguageModel(config, Rules())
    logits = jax.jit(lambda given, ids: apply_network(network, given, ids).logits)(variables, jnp.asarray(tokens))
    return np.asarray(logits, np.float32)


def check_lines(found: Mapping[str, Any]) -> list[str]:
    """The result for a reader."""
    lines = [f"read back: {found['files']} files, {found['bytes']:,} bytes, as they were written"]
    if "not_compared" in found:
        return [*lines, f"logits are not compared: {found['not_compared']}"]
    how = ("the same bits as the source's" if found["same_bits"] else
           f"the source's up to {found['difference']:.1e} of the largest (two programs round differently)")
    return [*lines, f"logits of {found['tokens']} random tokens: {how}"]
