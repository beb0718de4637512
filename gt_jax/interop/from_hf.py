"""From a folder as transformers writes it to a checkpoint of ours, tensor by tensor.

- Everything is checked before anything is written: config, names, shapes, dtypes, tokenizer; one refusal lists it all.
- Held at a time: `SLAB` bytes of our values, and of the mapped sources about as many.
- Norms that multiply by 1 + w are stored as 1 + w in float32, the number that both systems compute with. Where w does
  not come back from that bit for bit, the bits that differ are kept in the metadata (`forms`): the way back is exact.
- TARGET is there when it is whole; a kill leaves TARGET.converting, which the next try clears.
"""

from __future__ import annotations

import base64
import itertools
import math
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.arrays import ArrayFiles
from gt_jax.checkpoints.checksums import Written, note_checksums, sums_of_arrays
from gt_jax.checkpoints.folders import CONVERTING, StrPath, parent_made, publish
from gt_jax.checkpoints.leftovers import ARRAYS, EMPTY, clear
from gt_jax.checkpoints.lock import only_writer
from gt_jax.configs.lineage import LINEAGE
from gt_jax.errors import refuse_all
from gt_jax.files import explain_full_disk
from gt_jax.interop import expected_tensors
from gt_jax.interop.expected_tensors import exact
from gt_jax.interop.families.rows import PlusOne, Unit, flat_start, units, whole_shapes
from gt_jax.interop.hf_folder import HFFolder, counted
from gt_jax.interop.tensor_files import in_order, let_go, same_bytes
from gt_jax.interop.to_orbax import Progress, refuse_existing
from gt_jax.text.tokenizers import chosen_tokenizer

SLAB = 64 * 2**20  # bytes of ours that are made at a time
_GAIN = "/gain"


def from_hf(source: StrPath, target: StrPath, *, step: int | None = None, tokenizer: str | None = None,
            progress: Progress | None = None) -> dict[str, Any]:
    """Write the checkpoint `target` from the folder `source`; returns a report.

    `tokenizer` takes the place of the folder's own. Raises `Refused` that lists everything that does not fit, with
    nothing written.
    """
    say = progress or (lambda line: None)
    started = time.monotonic()
    place = refuse_existing(target)
    folder = HFFolder(source)
    config = folder.config
    leaves = expected_tensors.model_leaves(config)
    found = list(units(config, folder.family.table(config, folder.variants)))
    say(f"{folder.family.model_type}: {len(folder.places)} tensors of layout {config.layout}, width {config.width}")
    _check(folder, found, leaves)
    if folder.left_out:
        say(f"left out: {counted(folder.left_out)}")
    dtypes, forms = _dtypes(folder, found)
    metadata: dict[str, Any] = {
        "config": config.to_json(), "kind": "converted", "step": 0 if step is None else step,
        "converted_from": {
            "source": str(folder.path), "files": {file.path.name: file.path.stat().st_size for file in folder.files},
            "tensors": len(folder.places), "family": folder.family.model_type, "config": folder.data,
            "variants": folder.variants, "dtypes": dtypes, "beside": folder.beside(),
            "left_out": counted(folder.left_out), "forms": forms}}  # fmt: skip
    lineage = next((file.lineage for file in folder.files if file.lineage is not None), None)
    if lineage is not None:
        metadata[LINEAGE] = lineage
    named = folder.tokenizer() if tokenizer is None else tokenizer
    metadata["tokenizer"] = chosen_tokenizer(metadata, named, folder.path)
    with parent_made(place), only_writer(place), explain_full_disk(place, "do it again"):
        refuse_existing(place)  # another process may have finished it meanwhile
        _write(folder, place, found, leaves, metadata, say)
    return {"source": [str(folder.path)], "target": str(place), "step": metadata["step"],
            "family": folder.family.model_type, "tensors": len(folder.places), "left_out": counted(folder.left_out),
            "leaves": len(leaves), "bytes": sum(map(_nbytes, leaves.values())), "tokenizer": metadata["tokenizer"],
            "beside": sorted(metadata["converted_from"]["beside"]),
            "source_checksums": all(file.has_checksums for file in folder.files),
            "seconds": time.monotonic() - started, "config": config.to_json()}  # fmt: skip


def _check(folder: HFFolder, found: Sequence[Unit], leaves: Mapping[str, Any]) -> None:
    """Raise `Refused` that lists every tensor that is missing, left over, of another shape, or would be rounded."""
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    wanted, problems = whole_shapes(found, shapes), list(folder.problems)
    tensors = folder.tensors
    problems += [f"{name} is missing; the config says {list(shape)}" for name, shape in wanted.items()
                 if name not in tensors]
    problems += [f"{place} is not a tensor of this model" for name, place in folder.places.items()
                 if name not in wanted]
    problems += [f"{folder.places[name]} has shape {list(tensors[name].shape)}; the config says {list(shape)}"
                 for name, shape in wanted.items() if name in tensors and tensors[name].shape != shape]
    seen: set[str] = set()
    for unit in found:
        stored = unit.parts[0].path
        for name in unit.cut or (unit.name,):
            if name in tensors and name not in seen and not exact(tensors[name].dtype, leaves[stored].dtype):
                problems.append(f"{folder.places[name]} is {tensors[name].dtype}; {leaves[stored].dtype}, as it would "
                                "be stored, does not hold its values exactly")
            seen.add(name)
    covered = {part.path for unit in found for part in unit.parts}
    problems += [f"{path} of ours has no counterpart" for path in leaves
                 if path not in covered and not path.endswith(_GAIN)]
    refuse_all(problems, f"{folder.path} cannot be converted as {folder.family.model_type}, layout "
                         f"{folder.config.layout}, width {folder.config.width}:")


def _dtypes(folder: HFFolder, found: Sequence[Unit]) -> tuple[dict[str, str], dict[str, Any]]:
    """The dtype of each kind of tensor, and the tensors that have another, or bits that 1 + w does not hold."""
    tensors = folder.tensors  # once: it is made anew at each call, of tens of thousands where experts lie apart
    by_kind: dict[str, Counter[str]] = {}
    for unit in found:
        by_kind.setdefault(unit.kind, Counter())[str(tensors[(unit.cut or (unit.name,))[0]].dtype)] += 1
    dtypes = {kind: count.most_common(1)[0][0] for kind, count in by_kind.items()}
    forms: dict[str, Any] = {}
    for unit in found:
        for name in unit.cut or (unit.name,):
            dtype = str(tensors[name].dtype)
            form: dict[str, Any] = {} if dtype == dtypes[unit.kind] else {"dtype": dtype}
            if isinstance(unit.parts[0].transform, PlusOne) and (kept := _lost_bits(folder.read(name))) is not None:
                form["bits"] = kept
            if form:
                forms[name] = form
    return dtypes, forms


def _lost_bits(weight: np.ndarray) -> str | None:
    """What w differs by, bit by bit, from what 1 + w gives back; None where it gives back all."""
    transform = PlusOne()
    back = transform.to_origin(transform.to_ours(weight, weight.shape)).astype(weight.dtype)
    if same_bytes(back, weight):
        return None
    return base64.b64encode(zlib.compress((_bits(back) ^ _bits(weight)).tobytes(), 9)).decode()


def with_bits(weight: np.ndarray, kept: str, ours: np.ndarray) -> np.ndarray:
    """The inverse of `_lost_bits`: the weight as it was where 1 + w still is what we hold, `ours`; else `weight`."""
    lost = np.frombuffer(zlib.decompress(base64.b64decode(kept)), np.uint8)
    before = (_bits(weight) ^ lost).view(weight.dtype).reshape(weight.shape)
    same = PlusOne().to_ours(before, ours.shape).astype(ours.dtype) == ours
    return np.where(same.reshape(weight.shape), before, weight)


def _bits(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _write(folder: HFFolder, place: Path, found: Sequence[Unit], leaves: Mapping[str, Any],
           metadata: Mapping[str, Any], say: Progress) -> None:
    """Tensor by tensor in the stage's folder, then one rename; whatever fails leaves nothing."""
    stage = place.with_name(place.name + CONVERTING)
    clear(stage, (ARRAYS, EMPTY), f"the conversion to {place.name}")
    arrays = {path: ArrayFiles.of(stage / "state", path, tuple(leaf.shape), np.dtype(leaf.dtype))
              for path, leaf in leaves.items()}
    shapes = {path: array.shape for path, array in arrays.items()}
    written = Written(stage)
    total, done, said = sum(map(_nbytes, leaves.values())), 0, 0
    started = time.monotonic()
    try:
        for path, array in arrays.items():
            array.create()
            if path.endswith(_GAIN):
                array.write(0, np.ones(array.shape, array.dtype), written)
        for unit, there in _read(folder, found):
            values = unit.to_ours(there, shapes)
            for part, value in zip(unit.parts, values, strict=True):
                array = arrays[part.path]
                start = flat_start(part, array.shape)
                for offset, slab in _slabs(value, array.dtype):
                    array.write(start + offset, slab, written)
                done += value.size * array.dtype.itemsize
            del there, values
            if done - said >= 2**28:
                said = done
                rate = done / max(time.monotonic() - started, 1e-9) / 2**20
                say(f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB, {rate:.0f} MiB/s")
        for array in arrays.values():
            array.sync()
        checkpoint.write_metadata(stage, list(leaves), metadata)
        note_checksums(stage, *sums_of_arrays(stage, arrays, written.pieces()))
        publish(stage, place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _read(folder: HFFolder, found: Sequence[Unit]) -> Iterator[tuple[Unit, np.ndarray]]:
    """Every unit with its values there; a tensor that experts share is read, and so compared, once for all of them."""
    for _, same in itertools.groupby(found, lambda unit: unit.name):
        first, *others = same
        there = np.concatenate(list(map(folder.read, first.cut))) if first.cut else folder.read(first.name)
        for unit in (first, *others):
            yield unit, there if unit.expert is None else there[unit.expert]
        del there


def _slabs(value: np.ndarray, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor's values in C order, about `SLAB` bytes at a time, with where they begin."""
    if value.ndim == 0 or value.size * dtype.itemsize <= SLAB:
        yield 0, in_order(value).astype(dtype, copy=False)
        let_go(value)
        return
    row = math.prod(value.shape[1:])
    rows = max(1, SLAB // (row * dtype.itemsize))
    for begin in range(0, len(value), rows):
        yield begin * row, in_order(value[begin : begin + rows]).astype(dtype, copy=False)
        let_go(value)


def _nbytes(leaf: Any) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
