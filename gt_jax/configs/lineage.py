"""How a model came to be, as the metadata of its checkpoint say: one record a step, oldest first.

- A checkpoint's own step lies open in its metadata: `run`, `data`, `files`, ... of a training, `grown_from`,
  `retrofitted_from`, `calibrated`, `converted_from`. The steps before it are the list `lineage`. No step is written
  twice.
- Every command that makes a checkpoint from another writes `carried(metadata of that one)` as its `lineage`; a file of
  another format holds `exported(...)`, with the export as its last step.
- Metadata of earlier versions kept `grown_from` and `calibrated` beside a later `run`: they are read as the same steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

LINEAGE = "lineage"
TOKENIZER_FILE = "tokenizer_file"  # what a checkpoint carries (gt_jax/configs/tokenizer_file.py)
Record = dict[str, Any]

_OWN = {  # what each kind of step writes, in the order in which they can follow each other in old metadata
    "converted": ("converted_from",), "retrofitted": ("retrofitted_from",), "grown": ("grown_from",),
    "calibrated": ("calibrated",), "train": ("run", "data", "files", "text", "price"),
}  # fmt: skip
KINDS = ("model", *_OWN)
"""What a checkpoint may say that it is."""
_SHARED = ("step", "tokenizer", TOKENIZER_FILE)


def chain(metadata: Mapping[str, Any]) -> list[Record]:
    """All steps, oldest first; the last is the checkpoint's own. A record is {"kind", "step", ...what it used}."""
    found = [{"kind": kind, **{name: metadata[name] for name in names if name in metadata}}
             for kind, names in _OWN.items()
             if names[0] in metadata or kind == metadata.get("kind")]  # fmt: skip
    found = found or [{"kind": str(metadata.get("kind", "model"))}]
    found[-1] |= {name: metadata[name] for name in _SHARED if name in metadata}
    return [*metadata.get(LINEAGE, ()), *found]


def exported(metadata: Mapping[str, Any], source: str) -> list[Record]:
    """`carried` for a file of another format that is written from the checkpoint `source`: the export is a step too."""
    step = {"step": metadata["step"]} if "step" in metadata else {}
    return [*carried(metadata), {"kind": "exported", "exported": {"source": source}, **step}]


def carried(metadata: Mapping[str, Any]) -> list[Record]:
    """`chain` for the metadata of what is made from this checkpoint: without what only the way back needs."""
    return [_without_forms(record) for record in chain(metadata)]


def earlier(metadata: Mapping[str, Any]) -> list[Record]:
    """The steps before the checkpoint's own."""
    return chain(metadata)[:-1]


def newest(metadata: Mapping[str, Any], name: str) -> Any:
    """`name` of the newest step that has it, for example "grown_from"; None where none does."""
    return next((record[name] for record in reversed(chain(metadata)) if name in record), None)


def trainings(metadata: Mapping[str, Any]) -> list[Record]:
    """The steps that were training runs whose config is known, newest first."""
    return [record for record in reversed(chain(metadata)) if isinstance(record.get("run"), Mapping)]


def fits(metadata: Mapping[str, Any]) -> list[Record]:
    """What calibrations say of the text whose training part they read, its `data` and `files`, newest first."""
    found = (record.get("calibrated") for record in reversed(chain(metadata)))
    return [dict(one) for one in found if isinstance(one, Mapping) and isinstance(one.get("data"), Mapping)]


def is_lineage(value: Any) -> bool:
    """Whether a parsed JSON value is a list of records."""
    return isinstance(value, list) and all(isinstance(one, dict) and isinstance(one.get("kind"), str) for one in value)


def tree_lines(metadata: Mapping[str, Any]) -> list[str]:
    """The chain as lines for a reader: the model itself first, what it was made from below it."""
    lines = []
    for depth, record in enumerate(reversed(chain(metadata))):
        step = f" at step {record['step']}" if isinstance(record.get("step"), int) else ""
        head, details = _told(record, step)
        lines.append(f"{'   ' * (depth - 1)}{'└─ ' if depth else ''}{head}")
        lines += [f"{'   ' * depth}   {line}" for line in details]
    return lines


def _without_forms(record: Mapping[str, Any]) -> Record:
    """Forms are one entry a tensor, and mean nothing once the tensors are others."""
    made, origin = dict(record), record.get("converted_from")
    if isinstance(origin, Mapping):
        made["converted_from"] = {name: value for name, value in origin.items() if name != "forms"}
    return made


def _told(record: Mapping[str, Any], step: str) -> tuple[str, list[str]]:
    """What a step was, in a few words, and lines about what it used."""
    found = {name: value for name, value in record.items() if isinstance(value, Mapping)}
    tokenizer = [f"tokenizer {record['tokenizer']}"] if "tokenizer" in record else []
    if "run" in found:
        return f"trained{step}", _training(record)
    if "grown_from" in found:
        grown = found["grown_from"]
        plan, counts = grown.get("plan") or {}, grown.get("counts")
        by = [f"by a {plan.get('kind')} plan, {plan.get('source_layout')} -> {plan.get('layout')}"] if plan else []
        if isinstance(counts, Mapping):
            by.append(f"counts: {counts.get('origin')}" + _hash("sha256", counts.get("sha256")))
        return f"grown from {grown.get('source')}" + _hash("content", grown.get("content_hash")), by + tokenizer
    if "retrofitted_from" in found:
        made = found["retrofitted_from"]
        adaptive = made.get("adaptive") or {}
        return f"retrofitted from {made.get('source')}" + _hash("content", made.get("content_hash")), [
            f"strengths {', '.join(f'{one:g}' for one in adaptive.get('alpha', ()))}", *tokenizer]  # fmt: skip
    if "calibrated" in found:
        return f"calibrated{step}, from {found['calibrated'].get('grown')}", [
            f"on {found['calibrated'].get('text')}"]  # fmt: skip
    if "converted_from" in found:
        return f"converted{step} from {found['converted_from'].get('source')}", tokenizer
    if "exported" in found:
        return f"exported{step} from {found['exported'].get('source')}", tokenizer
    return f"{record.get('kind')}{step}", tokenizer


def _training(record: Mapping[str, Any]) -> list[str]:
    data, train = record["run"].get("data", {}), record["run"].get("train", {})
    optimizer, position = train.get("optimizer", {}), record.get("data")
    lines = [f"text: {record['text']}"] if "text" in record else []
    files: Iterable[Any] = record.get("files") or ()
    lines += [f"file {file['path']}" + _hash("sha256", file["sha256"]) for file in files]
    at = f", {position['batches']} batches read" if isinstance(position, Mapping) and "batches" in position else ""
    carried_file = record.get(TOKENIZER_FILE)
    own = _hash("sha256", carried_file.get("sha256")) if isinstance(carried_file, Mapping) else ""
    lines.append(f"tokenizer {data.get('tokenizer', 'bytes')}{own}, rows of {data.get('sequence_length')}, held out "
                 f"{data.get('held_out')}{at}")  # fmt: skip
    if optimizer:
        price = f", price {record['price']:.4g}" if isinstance(record.get("price"), float) else ""
        lines.append(f"{optimizer.get('schedule')} schedule, learning rate {optimizer.get('learning_rate')}{price}")
    start = record["run"].get("start")
    return [*lines, f"started from {start}"] if start else lines


def _hash(name: str, value: Any) -> str:
    return f" ({name} {value[:12]})" if isinstance(value, str) else ""
