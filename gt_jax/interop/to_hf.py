"""From a checkpoint of ours to a folder that transformers opens: config.json, shards with an index, tokenizer.

- A model goes out as the family it came from, whatever its depth is now; one of our own as the family that has it.
- Tensors go out in the dtype they came in, and those of a conversion bit for bit as they came. What that dtype does
  not hold is rounded, and the report counts it.
- A gain of 1 needs nothing. A gain of 0 is exact: the layer's projections back to the stream, or the norms that come
  after them, are zeros. Others do not fold, since the MLP reads the mixer's output; with `approximate` each of the two
  is scaled by the gain (gt_jax/interop/fold_cost.py).
- Held at a time: one tensor, of experts one expert's; of those that lie as they lie here a part. Beside it
  `_KEPT` bytes of chunks, since one chunk holds several experts.
- TARGET is there when it is whole; a kill leaves TARGET.unfinished, which the next try clears.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.checksums import combined, of_values, refuse_changed_values, usable
from gt_jax.checkpoints.folders import CHUNK, UNFINISHED, StrPath, parent_made, rename, sync
from gt_jax.checkpoints.leftovers import EMPTY, clear
from gt_jax.checkpoints.lock import only_writer
from gt_jax.checkpoints.opened import Opened, open_checkpoint
from gt_jax.checkpoints.slices import Slice, SliceReader
from gt_jax.checkpoints.tree_paths import differences
from gt_jax.configs.lineage import exported, newest
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.tokenizer_file import carried_tokenizer, packed
from gt_jax.errors import refuse_all
from gt_jax.files import explain_full_disk, unfinished_name, write_atomically
from gt_jax.interop import expected_tensors
from gt_jax.interop.expected_tensors import exact
from gt_jax.interop.families.family import Family, Json, depth_fields
from gt_jax.interop.families.registry import family_for
from gt_jax.interop.families.rows import SAME, Part, Unit, units, whole_shapes
from gt_jax.interop.fold_cost import carries_gain, fold_cost, scaled_by
from gt_jax.interop.from_hf import with_bits
from gt_jax.interop.hf_folder import BESIDE, CONFIG
from gt_jax.interop.safetensors import Writer
from gt_jax.interop.tensor_files import Info
from gt_jax.interop.tensor_transforms import Shape
from gt_jax.interop.to_orbax import Progress, refuse_existing
from gt_jax.interop.to_safetensors import dtype_named

SHARD = 4 * 2**30  # bytes of tensors in a shard
INDEX = "model.safetensors.index.json"
_GAIN = "/gain"
_KEPT = 4 * CHUNK  # gate and up of an expert are read in turn, and both must stay


class Export(NamedTuple):
    """What goes out: the family, its config.json, the units in order, and the form of each tensor."""

    family: Family
    data: Json
    found: Sequence[Unit]
    tensors: Mapping[str, Info]
    bits: Mapping[str, str]
    gains: Mapping[int, float]

    def narrows(self, unit: Unit, stored: Mapping[str, Any]) -> bool:
        """Whether a unit goes out in a dtype that does not hold every value of the dtype it is `stored` in."""
        return any(not exact(np.dtype(stored[part.path].dtype), self.tensors[name].dtype)
                   for part in unit.parts for name in unit.cut or (unit.name,))

    def leaving(self, unit: Unit, name: str, ours: Sequence[np.ndarray], shapes: Mapping[str, Shape]) -> np.ndarray:
        """The tensor, or its part, that a unit goes out as under a name, before it gets the dtype it has there."""
        value = unit.to_theirs(ours).reshape(unit.shape(shapes))
        if not unit.cut:
            return value
        rows = -(-len(value) // len(unit.cut))
        return value[rows * unit.cut.index(name) :][:rows]

    def back(self, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Our leaves by path, those that are rounded on the way out as they come back."""
        made, shapes = dict(leaves), {path: leaf.shape for path, leaf in leaves.items()}
        for unit in self.found:
            if not self.narrows(unit, leaves):
                continue
            ours = [made[part.path][part.place] for part in unit.parts]
            wide = {name: self.leaving(unit, name, ours, shapes) for name in unit.cut or (unit.name,)}
            there = [value.astype(self.tensors[name].dtype).astype(value.dtype) for name, value in wide.items()]
            values = unit.to_ours(np.concatenate(there) if unit.cut else there[0], shapes)
            for part, value in zip(unit.parts, values, strict=True):
                if made[part.path] is leaves[part.path]:
                    made[part.path] = leaves[part.path].copy()
                made[part.path][part.place] = value
        return made


def to_hf(source: StrPath, target: StrPath, *, approximate: bytes | None = None, shard_bytes: int = SHARD,
          progress: Progress | None = None) -> dict[str, Any]:
    """Write the model of the checkpoint (or of a run's newest step) `source` as the folder `target`; returns a report.

    `approximate` is a text: gains that are neither 0 nor 1 are folded, and the report says as "cost" what that, and
    the rounding to the dtypes that go out, costs on it. "rounded" are the tensors that were, counted by dtype.
    Raises `Refused` that lists everything that the family cannot express, with nothing written.
    """
    say = progress or (lambda line: None)
    started = time.monotonic()
    place = refuse_existing(target)
    opened = open_checkpoint(source)
    export = plan_export(opened, approximate is not None)
    folded = {layer: gain for layer, gain in export.gains.items() if gain not in (0, 1)}
    changes = folded or any(export.narrows(unit, opened.model) for unit in export.found)
    cost = fold_cost(opened, approximate, export.back, say) if changes and approximate is not None else None
    with parent_made(place), only_writer(place), explain_full_disk(place, "do it again"):
        refuse_existing(place)  # another process may have finished it meanwhile
        checksums = usable(opened.folder, say)
        stage = place.with_name(place.name + UNFINISHED)
        clear_export(stage, place)
        try:
            stage.mkdir()
            files, rounded = _write(opened, export, stage, shard_bytes, say)
            beside, tokenizer = _write_beside(opened, export, stage)
            sync(stage)
            rename(stage, place)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return {"source": str(opened.folder), "target": str(place), "step": opened.metadata.get("step"),
            "family": export.family.model_type, "tensors": len(export.tensors), "files": files,
            "bytes": sum(map(_nbytes, export.tensors.values())), "beside": beside, "tokenizer": tokenizer,
            "zeroed": [layer for layer, gain in export.gains.items() if gain == 0], "folded": folded, "cost": cost,
            "rounded": rounded, "source_checksums": checksums, "seconds": time.monotonic() - started,
            "config": opened.config.to_json()}  # fmt: skip


def plan_export(opened: Opened, approximate: bool = False) -> Export:
    """What goes out of a checkpoint; raises `Refused` that lists what the family cannot express."""
    config, metadata = opened.config, opened.metadata
    origin = newest(metadata, "converted_from") or {}
    family = family_for(config, origin.get("family"))
    expected = expected_tensors.model_leaves(config)
    problems = differences(expected, opened.model)
    problems += [f"{path} does not belong to its config" for path in opened.model if path not in expected]
    gains = {} if problems else _gains(opened)
    if not approximate:
        problems += [f"layer {layer} has gain {gain:g}, which {family.model_type} has no place for; 0 and 1 go out "
                     "exactly, others with --approximate" for layer, gain in gains.items() if gain not in (0, 1)]
    refuse_all(problems, f"checkpoint {opened.folder} cannot be written as {family.model_type}:")
    own = origin.get("family") == family.model_type
    found = list(units(config, family.table(config, origin.get("variants", ()) if own else ())))
    forms = origin.get("forms", {}) if metadata.get("kind") == "converted" else {}
    dtypes = origin.get("dtypes", {}) if own else {}
    shapes = whole_shapes(found, {path: tuple(leaf.shape) for path, leaf in expected.items()})
    kinds = {name: unit.kind for unit in found for name in unit.cut or (unit.name,)}
    tensors = {name: Info(shape, dtype_named(forms.get(name, {}).get(
        "dtype", dtypes.get(kinds[name], config.param_dtype)))) for name, shape in shapes.items()}  # fmt: skip
    bits = {name: form["bits"] for name, form in forms.items() if "bits" in form}
    made = config_file(config, family, origin.get("config", {}) if own else {}) | {"dtype": commonest(tensors)}
    return Export(family, made, found, tensors, bits, gains)


def config_file(config: ModelConfig, family: Family, origin: Mapping[str, Any]) -> Json:
    """config.json: what the source had, with what the model is now; of a multimodal source its text model's."""
    base = dict(origin.get("text_config", origin) if origin.get("model_type") == family.wrapper else origin)
    rope = {**(base.get("rope_scaling") or {}), **(base.get("rope_parameters") or {})}
    made = {**base, **family.write(config), **depth_fields(config)}
    made["rope_parameters"] = {**rope, **made["rope_parameters"]}
    for old in ("rope_scaling", "full_attention_interval", "torch_dtype"):
        made.pop(old, None)
    for old in ("rope_theta", "partial_rotary_factor"):  # where readers of before transformers 5 look
        if old in made:
            made[old] = made["rope_parameters"].get(old, made[old])
    if "mtp_num_hidden_layers" in made:
        made["mtp_num_hidden_layers"] = 0  # their tensors do not go out
    return {**made, "model_type": family.model_type, "architectures": [family.architecture]}


def commonest(tensors: Mapping[str, Info]) -> str:
    """The dtype of most values that go out: what a reader loads the model in."""
    values: Counter[str] = Counter()
    for info in tensors.values():
        values[str(info.dtype)] += math.prod(info.shape)
    return values.most_common(1)[0][0]


def _gains(opened: Opened) -> dict[int, float]:
    """The gain of every layer."""
    paths = [path for path in opened.model if path.endswith(_GAIN)]
    made: dict[int, float] = {}
    for path, values in checkpoint.load_paths(opened.folder, paths).items():
        segment, slot = (int(part.removeprefix(name)) for part, name in
                         zip(path.split("/")[1:3], ("segment", "layer"), strict=True))
        made |= {opened.config.depth.layer(segment, block, slot): float(gain) for block, gain in enumerate(values)}
    return dict(sorted(made.items()))


def clear_export(stage: Path, place: Path) -> None:
    """Delete what a killed export left; raises `Refused` where something else has that name."""
    own = stage.is_dir() and not stage.is_symlink() and all(
        file.suffix in (".safetensors", ".json", ".jinja", ".model", ".tmp", ".gt_jax-tmp")
        for file in stage.iterdir())  # fmt: skip
    first = unfinished_name(stage / CONFIG)  # alone where the kill came before all of it was written
    if own and ((stage / CONFIG).is_file() or os.listdir(stage) == [first.name]):
        shutil.rmtree(stage)
    else:
        clear(stage, (EMPTY,), f"the export to {place.name}")


def shards_of(tensors: Mapping[str, Info], limit: int) -> list[list[str]]:
    """The names of each shard, in order, each up to `limit` bytes."""
    made: list[list[str]] = [[]]
    held = 0
    for name, info in tensors.items():
        if made[-1] and held + _nbytes(info) > limit:
            made.append([])
            held = 0
        made[-1].append(name)
        held += _nbytes(info)
    return made


def _write(opened: Opened, export: Export, stage: Path, limit: int,
           say: Progress) -> tuple[list[str], dict[str, int]]:
    """config.json first, which marks the folder as ours, then shard by shard, then the index.

    Returns the names of the files, and how many tensors were rounded, by the dtype that they went out in.
    """
    write_atomically(stage / CONFIG, json.dumps(export.data, indent=2, sort_keys=True) + "\n")
    reader = _Reader(opened, export)
    by_name: dict[str, list[Unit]] = {}
    for unit in export.found:
        for name in unit.cut or (unit.name,):
            by_name.setdefault(name, []).append(unit)
    shards = shards_of(export.tensors, limit)
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]  # fmt: skip
    lineage = packed(exported(opened.metadata, str(opened.folder)), None)
    total, done, started = sum(map(_nbytes, export.tensors.values())), 0, time.monotonic()
    for file, held in zip(names, shards, strict=True):
        first = lineage if file == names[0] else None
        with Writer(stage / file, {name: export.tensors[name] for name in held}, lineage=first) as writer:
            for name in held:
                of = functools.partial(reader.theirs, name, export.tensors[name])
                writer.put_parts(name, itertools.chain.from_iterable(map(of, by_name[name])))
        done += sum(_nbytes(export.tensors[name]) for name in held)
        rate = done / max(time.monotonic() - started, 1e-9) / 2**20
        say(f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB, {rate:.0f} MiB/s")
    reader.compare()
    if len(names) > 1:
        index = {name: file for file, held in zip(names, shards, strict=True) for name in held}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}, indent=2)
        write_atomically(stage / INDEX, text + "\n")
    return names, dict(Counter(str(export.tensors[name].dtype) for name in reader.rounded))


def _write_beside(opened: Opened, export: Export, stage: Path) -> tuple[list[str], str | None]:
    """The small texts that came with the model, and its tokenizer; returns their names."""
    origin = newest(opened.metadata, "converted_from") or {}
    beside = {name: text for name, text in origin.get("beside", {}).items() if name in BESIDE}
    for name, text in beside.items():
        write_atomically(stage / name, text)
    tokenizer = carried_tokenizer(opened.metadata)
    if tokenizer is None:
        return sorted(beside), None
    write_atomically(stage / tokenizer.name, tokenizer.content)
    return sorted(beside), tokenizer.name


class _Reader:
    """Values of a checkpoint as the family has them, gains folded in; what was read is compared at the end."""

    def __init__(self, opened: Opened, export: Export) -> None:
        self._opened, self._export = opened, export
        self._reader = SliceReader(opened.folder, opened.tensors, _KEPT)
        self._shapes = {path: tuple(leaf.shape) for path, leaf in opened.model.items()}
        self._sums: dict[str, dict[tuple[int, ...], tuple[int, int]]] = {}
        self.rounded: set[str] = set()  # names of tensors whose values the dtype that they go out in does not hold

    def theirs(self, name: str, info: Info, unit: Unit) -> Iterator[np.ndarray]:
        """One unit, or its part of that name, in the dtype it goes out in: whole, or in parts where it lies alike."""
        kept = self._export.bits.get(name)
        part = unit.parts[0]
        if part.transform == SAME and not part.place and kept is None:
            yield from (self._cast(name, info, self._folded(unit, part, values)) for values in self._flat(part))
            return
        ours = [self._folded(unit, part, self._read(part)) for part in unit.parts]
        value = self._export.leaving(unit, name, ours, self._shapes)
        yield self._cast(name, info, value) if kept is None else with_bits(value.astype(info.dtype), kept, ours[0])

    def _cast(self, name: str, info: Info, value: np.ndarray) -> np.ndarray:
        """`value` in the dtype that it goes out in; notes the name where that rounds it."""
        made = value.astype(info.dtype, copy=False)
        if not exact(value.dtype, info.dtype) and name not in self.rounded and not np.array_equal(
                made.astype(value.dtype), value, equal_nan=True):  # fmt: skip
            self.rounded.add(name)
        return made

    def compare(self) -> None:
        """Raise `Damaged` where what was read is not what was written."""
        found = {}
        for path, places in self._sums.items():
            value = 0
            for _, (crc, size) in sorted(places.items()):
                value = combined(value, crc, size)
            found[path] = value
        refuse_changed_values(self._opened.folder, found, self._reader.noted)

    def _read(self, part: Part) -> np.ndarray:
        shape = self._shapes[part.path][len(part.place) :]
        made = np.empty(math.prod(shape), self._opened.model[part.path].dtype)
        done = 0
        for values in self._flat(part):
            made[done : done + values.size] = values
            done += values.size
        return made.reshape(shape)

    def _flat(self, part: Part) -> Iterator[np.ndarray]:
        """The values of a part in C order: those of a whole tensor a piece at a time, a block's or an expert's at
        once."""
        shape = self._shapes[part.path][len(part.place) :]
        whole = (Slice(part.path, 0, math.prod(shape), part.place),)
        summed, size = 0, 0
        for one in whole if part.place else self._reader.slices(part.path):
            values = self._reader.read(one)()
            summed, size = combined(summed, of_values(values), values.nbytes), size + values.nbytes
            self._sums.setdefault(part.path, {})[part.place] = summed, size
            yield values

    def _folded(self, unit: Unit, part: Part, value: np.ndarray) -> np.ndarray:
        """`value` with the layer's gain in it, where it is what the layer gives back to the stream."""
        gain = 1.0 if unit.layer is None else self._export.gains[unit.layer]
        if gain == 1:
            return value
        post = self._opened.config.has_post_norm(self._opened.config.depth.types[unit.layer or 0])
        if not carries_gain(part.path, post):
            return value
        return scaled_by(value, np.asarray(gain)) if gain else np.zeros_like(value)


def _nbytes(info: Info) -> int:
    return math.prod(info.shape) * info.dtype.itemsize
