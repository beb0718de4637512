"""How well checkpoints predict held-out text: nats a token, bits per byte, perplexity, with intervals and differences.

All see the same rows, spread over the whole held-out part; intervals are over its documents, or its places where
several are of one document (`evaluation.held_out_rows`). Where answers have a difficulty, as those of tasks have, they
are counted by it too (`evaluation.answer_table`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.processes import ProcessGroup
from gt_jax.devices.sharding import Rules, mesh_for_rows
from gt_jax.errors import Refused, refuse_all
from gt_jax.evaluation.answer_table import AnswerTable, answer_table
from gt_jax.evaluation.confidence_intervals import Interval, ratio_interval, sums_by_unit
from gt_jax.evaluation.held_out_rows import held_out_rows
from gt_jax.evaluation.loading import HELD_OUT_BATCHES, data_config, names_text, text_note
from gt_jax.evaluation.model_files import Checkpoint, open_checkpoint
from gt_jax.evaluation.pairs import incomparable
from gt_jax.evaluation.read_together import read_together
from gt_jax.evaluation.scoring import byte_lengths, score, targets_of
from gt_jax.models.language_model import fixed_passes, free_passes
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.monitoring.metrics import json_values
from gt_jax.text.batches import Batch, Text
from gt_jax.text.data import Data, open_data, short_parts
from gt_jax.text.tokenizers import Tokenizer, open_tokenizer
from gt_jax.training.divisibility import indivisible_fields
from gt_jax.typing import Tree

CONFIDENCE = 0.95

Passes = tuple[int, ...] | None

Say = Callable[[str], None]


class Covered(NamedTuple):
    """What was scored: by unit the tokens and the bytes that they stand for; each token's unit; counts."""

    kind: str
    units: Any
    tokens: Any
    bytes: Any
    ends: int


def evaluate_checkpoints(
    sources: Sequence[Path], named: dict[str, Any] | None = None, batches: int | None = HELD_OUT_BATCHES,
    passes: Passes = None, *, say: Say = lambda line: None, mesh: jax.sharding.Mesh | None = None,
    group: ProcessGroup | None = None, by_difficulty: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate checkpoints on the same held-out rows; returns JSON values, figures that are not finite as strings.

    Args:
        sources: checkpoints or run directories; all of one tokenizer.
        named: DataConfig fields that name other text (None: what the first checkpoint was trained on).
        batches: how many batches of that run's shape, None for all there are.
        passes: of every adaptive model, one number or one a layer; None leaves them to its halting heads.
        mesh: where they run; None takes as many devices as divide a batch.
        group: the processes, each of which calls it; then there is a mesh of the devices of all.
        by_difficulty: refuse data without a task; those of its answers are reported anyway.

    Raises `Refused` that lists all that keeps them from being evaluated, before anything is computed. A model whose
    losses are not finite gets no limits and no verdict.
    """
    group = group or ProcessGroup()
    opened, tokenizer, text = group.agree(lambda: _open(sources, named, batches, passes, mesh))
    first = opened[0]
    held_out = held_out_rows(text, batches)
    rows = held_out.batches
    asked = group.agree(lambda: answers_asked(text, batches, by_difficulty))
    covered = _covered(held_out.kind, held_out.scored_units(), targets_of(rows), tokenizer)
    sums, tables = [], []
    with jax.set_mesh(mesh or mesh_for_rows(text.config.batch_size)):
        for one in opened:
            say(f"{one.path}: {len(rows)} batches")
            control = _control(one.config, passes)
            variables = one.load()
            nats = score(one.config, variables, rows, control, Rules())
            sums.append(sums_by_unit(nats, covered.units))
            tables.append(_tables(one, variables, asked, passes, say))
    found: dict[str, Any] = json_values({
        "text": text.summary(),
        "rows": int(sum((batch["targets"] >= 0).any(axis=1).sum() for batch in rows)),
        "tokens": int(covered.tokens.sum()), "bytes": int(covered.bytes.sum()), "ends": covered.ends,
        "confidence": CONFIDENCE, "units": {"kind": covered.kind, "count": len(covered.tokens)},
        "notes": [*_notes(opened, text, named), *_unmixed(text, batches)],
        "models": [{**_figures(one, nats, covered, passes), "answers": {name: of.to_json() for name, of in own.items()}}
                   for one, nats, own in zip(opened, sums, tables, strict=True)],
        "differences": [{**_difference(first, one, nats - sums[0], covered), "answers": _gains(own, tables[0])}
                        for one, nats, own in zip(opened[1:], sums[1:], tables[1:], strict=True)],
    })  # fmt: skip
    return found


def _open(
    sources: Sequence[Path], named: dict[str, Any] | None, batches: int | None, passes: Passes,
    mesh: jax.sharding.Mesh | None,
) -> tuple[list[Checkpoint], Tokenizer, Text | Data]:  # fmt: skip
    """All that can be refused before anything is computed."""
    if batches is not None and batches < 1:
        raise Refused(f"--batches is {batches}; at least one is needed, and --all takes all there are")
    if not sources:
        raise Refused("there is no checkpoint to evaluate; name at least one")
    opened = [open_checkpoint(source) for source in sources]
    first = opened[0]
    data = data_config(first.metadata, named, first.path)
    tokenizer = open_tokenizer(data.tokenizer)
    of_user = (named or {}).get("tokenizer")
    wrong = [problem for other in opened[1:] for problem in incomparable(first, other, of_user)]
    for one in opened:
        wrong += _misfits(one, data, passes, tokenizer.vocab_size)
        if mesh is not None:
            uneven = indivisible_fields(one.config, data.batch_size, mesh.shape, Rules())
            wrong += [f"{one.path}: {line}" for line in uneven]
    if passes is not None and all(one.config.adaptive is None for one in opened):
        wrong.append("--passes fixes the passes of adaptive models; here every layer runs once, leave it out")
    refuse_all(wrong, "this cannot be evaluated:")
    return opened, tokenizer, open_data(data)


def _misfits(one: Checkpoint, data: DataConfig, passes: Passes, tokens: int) -> list[str]:
    """Why this checkpoint cannot run on these rows, or not with these passes."""
    config, wrong = one.config, []
    if config.vocab < tokens:
        wrong.append(f"{one.path} has vocab {config.vocab}; the tokens of the text need {tokens}")
    memory = config.memory
    if memory is not None and data.sequence_length > memory.chunk and data.sequence_length % memory.chunk:
        wrong.append(f"{one.path} reads rows in chunks of {memory.chunk}; rows of {data.sequence_length} are not whole")
    if passes is None or config.adaptive is None:
        return wrong
    most, layers = config.adaptive.max_passes, len(config.depth)
    if len(passes) not in (1, layers):
        wrong.append(f"--passes has {len(passes)} numbers; {one.path} has {layers} layers")
    if not all(1 <= count <= most for count in passes):
        wrong.append(f"--passes is {','.join(map(str, passes))}; a layer of {one.path} runs 1 to {most} times")
    return wrong


def _control(config: ModelConfig, passes: Passes) -> PassControl:
    if passes is None or config.adaptive is None:
        return free_passes()
    return fixed_passes(passes[0] if len(passes) == 1 else passes)


def answers_asked(data: Text | Data, batches: int | None, needed: bool = False) -> dict[str, list[Batch]]:
    """The held-out batches of each part of the data in which an answer of known difficulty is asked.

    Raises `Refused` where that is none and one is `needed`.
    """
    found = {name: rows for name, rows in data.held_out_by_part(batches).items()
             if any("difficulty" in batch and (batch["difficulty"] > 0).any() for batch in rows)}  # fmt: skip
    if needed and not found:
        raise Refused("no answer of known difficulty is in this data; name a task, for example --task pointer_jumps")
    return found


def _tables(
    one: Checkpoint, variables: Tree, asked: Mapping[str, Sequence[Batch]], passes: Passes, say: Say
) -> dict[str, AnswerTable]:
    """The answers of a model to each part; with other passes beside them where it chooses its own."""
    control = None if passes is None or one.config.adaptive is None else _control(one.config, passes)

    def table(name: str) -> AnswerTable:
        return answer_table(one.config, variables, asked[name], control, rules=Rules(),
                            say=lambda line: say(f"{one.path}, {name}, {line}"))  # fmt: skip

    return {name: table(name) for name in asked}


def _gains(tables: Mapping[str, AnswerTable], first: Mapping[str, AnswerTable]) -> dict[str, Any]:
    """What share of the answers more is right than by the first model."""
    gains = {name: one.gain_over(first[name]) for name, one in tables.items()}
    return {name: {"accuracy_all": gain.all.to_json(), "accuracy_hardest": gain.hardest.to_json()}
            for name, gain in gains.items()}  # fmt: skip


def _covered(kind: str, units: Any, targets: Any, tokenizer: Tokenizer) -> Covered:
    stands_for = byte_lengths(tokenizer)[targets].astype(np.float64)
    tokens = sums_by_unit(np.ones(len(targets)), units)
    ends = int(np.count_nonzero(targets == tokenizer.end_of_document))
    return Covered(kind, units, tokens, sums_by_unit(stands_for, units), ends)


def _notes(opened: Sequence[Checkpoint], text: Text | Data, named: Mapping[str, Any] | None) -> list[str]:
    """Where the text may not be held out for every model, and where a model depends on what is read together."""
    found = [text_note(one.metadata, text, one.path, names_text(named) or one is not opened[0]) for one in opened]
    told = {one.path: read_together(one.config) for one in opened}
    return [*(note for note in found if note is not None),
            *(f"{path}: {note}" for path, note in told.items() if note is not None)]


def _unmixed(text: Text | Data, batches: int | None) -> list[str]:
    """Where batches of data of several parts are not as the data is mixed: all there are, or more than a part has."""
    if isinstance(text, Text) or len(text.parts) < 2:
        return []
    if batches is not None:
        return short_parts(text, batches, text.held_out_by_part(batches))
    tokens = {name: sum(int((batch["targets"] >= 0).sum()) for batch in rows)
              for name, rows in text.held_out_by_part(None).items()}  # fmt: skip
    shares = ", ".join(f"{100 * count / sum(tokens.values()):.3g} % {name}" for name, count in tokens.items())
    return [f"--all takes each part whole, so these figures are of {shares} by tokens, whatever the parts' weights in "
            "the data; --batches N takes rows as the weights say"]  # fmt: skip


def _intervals(nats: Any, covered: Covered) -> tuple[Interval, Interval]:
    """Nats a token and bits a byte; these are no number where the targets stand for no byte, as ends of documents."""
    bits = Interval(math.nan, None, None)
    if covered.bytes.sum() > 0:
        bits = ratio_interval(nats / math.log(2), covered.bytes, CONFIDENCE)
    return ratio_interval(nats, covered.tokens, CONFIDENCE), bits


def _figures(one: Checkpoint, nats: Any, covered: Covered, passes: Passes) -> dict[str, Any]:
    a_token, a_byte = _intervals(nats, covered)
    fixed = None if passes is None or one.config.adaptive is None else list(passes)
    return {
        "checkpoint": str(one.path), "step": one.metadata.get("step"), "layout": one.config.layout, "passes": fixed,
        "depth": "fixed" if fixed else _decides(one.config),
        "nats_per_token": a_token.to_json(), "bits_per_byte": a_byte.to_json(),
        "perplexity": {name: None if x is None else _exp(x) for name, x in a_token.to_json().items()},
    }  # fmt: skip


def _decides(config: ModelConfig) -> str:
    """What decides how many passes, or layers, a token runs."""
    return "gates" if config.halting is not None else "exit" if config.exit is not None else "once"


def _exp(nats: float) -> float | None:
    """None, JSON's way to say it, where it is beyond float64."""
    return None if nats >= 700 else math.exp(nats)


def _difference(first: Checkpoint, other: Checkpoint, nats: Any, covered: Covered) -> dict[str, Any]:
    """What `other` needs more than `first`, unit by unit; a verdict where the limits agree on the sign."""
    a_token, a_byte = _intervals(nats, covered)
    sign = a_token.sign()
    verdict = (a_token.without_limits(covered.kind) if sign is None
               else ("cannot be told apart", "worse", "better")[sign])  # fmt: skip
    return {
        "checkpoint": str(other.path), "against": str(first.path), "nats_per_token": a_token.to_json(),
        "bits_per_byte": a_byte.to_json(), "verdict": verdict,
    }  # fmt: skip
