"""From a checkpoint of ours to one .safetensors file in the origin's names, leaf by leaf.

- A tensor that came from the origin goes back with the dtype and shape it had there: bit for bit the same.
- Config and step go along in the file's `__metadata__`, so that the way back needs no --config.
- Refused: whatever the origin has no place for, above all a gain other than 1. Token bytes are left out; the origin
  takes them from its tokenizer.
- Held at a time: 256 MiB of leaves, or one larger leaf, twice while Orbax reads it; `3b` needs 2 GiB.
- What differs from the source's checksums is refused; the file has checksums of its own.
- TARGET is there when it is whole; a kill leaves TARGET.unfinished, which the next try overwrites.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.checksums import usable
from gt_jax.checkpoints.folders import UNFINISHED, StrPath, parent_made
from gt_jax.checkpoints.lock import only_writer
from gt_jax.checkpoints.opened import open_checkpoint
from gt_jax.checkpoints.tree_paths import differences
from gt_jax.configs.lineage import exported
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.presets import preset
from gt_jax.configs.tokenizer_file import carried_tokenizer, packed
from gt_jax.errors import Failed, Refused, refuse_all
from gt_jax.files import explain_full_disk, name_anew, sync
from gt_jax.interop.expected_tensors import Expected, expect, origin_infos
from gt_jax.interop.inferred_config import DEFAULTS
from gt_jax.interop.safetensors import Writer, is_ours
from gt_jax.interop.tensor_files import Info, groups, same_bytes
from gt_jax.interop.tensor_names import alpha_names
from gt_jax.interop.to_orbax import Progress, refuse_existing

_VARIANTS = {  # fields without a tensor that change what a layer computes
    "deltanet": ("rope", "conv_bias", "read_scale", "skip", "activation_on", "decay_floor", "beta_max"),
    "gsa": ("rope", "score_scale", "variance"),
    "adaptive": ("halting", "context", "features", "state_width", "by_pass", "logit_bound", "weights"),
}


def to_safetensors(source: StrPath, target: StrPath, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write the model of the checkpoint (or of a run's newest step) `source` as the file `target`; returns a report.

    Raises `Refused` that lists everything the origin has no place for, with nothing written.
    """
    say = progress or (lambda line: None)
    started = time.monotonic()
    place = refuse_existing(target)
    opened = open_checkpoint(source)
    where, config, metadata = opened.folder, opened.config, opened.metadata
    refuse_other_models(where, config)
    expected = _check(where, opened.model, config)
    tensors = _as_they_came(origin_infos(expected, config), metadata)
    step = metadata.get("step")
    unfinished = place.with_name(place.name + UNFINISHED)
    with parent_made(place), only_writer(place), explain_full_disk(place, "do it again"):
        refuse_existing(place)  # another process may have finished it meanwhile
        _refuse_foreign(unfinished, place)
        checksums = usable(where, say)
        try:
            lineage = packed(exported(metadata, str(where)), carried_tokenizer(metadata))
            with Writer(unfinished, tensors, config.to_json(), step, lineage) as writer:
                _write(where, expected, config, tensors, writer, say)
            _name(unfinished, place)
        finally:
            unfinished.unlink(missing_ok=True)
    return {"source": str(where), "target": str(place), "step": step, "tensors": len(tensors),
            "bytes": writer.nbytes, "dropped": [*expected.gains, *expected.tokens], "warnings": _variants(config),
            "source_checksums": checksums, "seconds": time.monotonic() - started, "config": config.to_json()}


def _name(unfinished: Path, place: Path) -> None:
    """Give the whole file its name, for good; raises `Refused` where something else has got it meanwhile."""
    try:
        name_anew(unfinished, place)
    except FileExistsError as error:
        raise Refused(f"target {place} has come meanwhile, and is left as it is; choose another target") from error
    sync(place.parent)


def _refuse_foreign(unfinished: Path, place: Path) -> None:
    """Raise `Refused` where something has the name of the file under way that no conversion has written."""
    plain = unfinished.is_file() and not unfinished.is_symlink()
    if os.path.lexists(unfinished) and not (plain and is_ours(unfinished)):
        raise Refused(f"{unfinished} is no unfinished conversion, and the conversion to {place.name} needs that name; "
                      "move it away")


def refuse_other_models(where: Path, config: ModelConfig) -> None:
    """Raise `Refused` for parts of the config that the origin does not have."""
    types = config.depth.types
    absent = {
        "S layers": "S" in types, "A layers": "A" in types, "B layers": "B" in types,
        "a dense MLP (moe is null)": config.moe is None, "exit": config.exit is not None,
        "copies that keep their gates (gated_copies)": config.gated_copies is not None,
        "the lambda stack": config.stack.kind == "lambda", "the midpoint stack": config.stack.kind == "midpoint",
        "a tied embedding": config.embedding.tied,
        "deltanet.variant 'groundthink'": "D" in types and config.deltanet is not None
        and config.deltanet.variant != "gated",
        "deltanet.head_gate_bias false": config.deltanet is not None and not config.deltanet.head_gate_bias,
        "deltanet.output_epsilon": config.deltanet is not None and config.deltanet.output_epsilon is not None,
        "moe.normalise false": config.moe is not None and not config.moe.normalise,
        "moe.shared_gate": config.moe is not None and config.moe.shared_gate,
        "moe.router_bias false": config.moe is not None and not config.moe.router_bias,
    }  # fmt: skip
    refuse_all([f"it has {what}" for what, there in absent.items() if there],
               f"checkpoint {where} is a model that the origin does not have:")


def _check(where: Path, stored: Mapping[str, jax.ShapeDtypeStruct], config: ModelConfig) -> Expected:
    """What the checkpoint holds; raises `Refused` that lists everything that does not fit or has no place there."""
    expected = expect(config)
    problems = differences(expected.tensors, stored)
    problems += [f"{path} does not belong to its config" for path in stored if path not in expected.tensors]
    problems += [f"{path} has no counterpart in the origin" for path in expected.foreign]
    if not problems:
        problems += _gains(where, expected, config)
    refuse_all(problems, f"checkpoint {where} cannot be written in the origin's names:")
    return expected


def _gains(where: Path, expected: Expected, config: ModelConfig) -> list[str]:
    """One line for every layer whose gain is not 1."""
    lines: dict[int, Any] = {}
    for path, gains in checkpoint.load_paths(where, expected.gains).items():
        segment, slot = (int(part.removeprefix(name)) for part, name in
                         zip(path.split("/")[1:3], ("segment", "layer"), strict=True))
        lines |= {config.depth.layer(segment, block, slot): gain for block, gain in enumerate(gains) if gain != 1}
    return [f"layer {layer} has gain {gain:g}; the origin has no gain, only 1 can be left out"
            for layer, gain in sorted(lines.items())]


def _as_they_came(written: Mapping[str, Info], metadata: Mapping[str, Any]) -> dict[str, Info]:
    """Shapes and dtypes as the origin had them, where the tensors are the origin's still."""
    if metadata.get("kind") != "converted":
        return dict(written)
    forms = metadata.get("converted_from", {}).get("forms", {})
    return {name: Info(tuple(forms[name][1]), dtype_named(forms[name][0])) if name in forms else info
            for name, info in written.items()}


def dtype_named(name: str) -> np.dtype:
    """The numpy dtype of a name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _write(where: Path, expected: Expected, config: ModelConfig, tensors: Mapping[str, Info], writer: Writer,
           say: Progress) -> None:
    """Every tensor, group by group of leaves as they are stored."""
    def nbytes(leaf: Any) -> int:
        tensor = expected.tensors[leaf.path]
        return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize

    total, done, started = sum(map(nbytes, expected.leaves)), 0, time.monotonic()
    for group in groups(expected.leaves, nbytes):
        values = checkpoint.read_leaves(where, {leaf.path: expected.tensors[leaf.path] for leaf in group})
        for leaf in group:
            value = values.pop(leaf.path)
            for block, name in enumerate(leaf.origins):
                piece = leaf.transform.to_origin(value[block, ...] if leaf.stacked else value)
                writer.put(name, _formed(name, piece, tensors[name]))
            done += value.nbytes
            del value
        rate = done / max(time.monotonic() - started, 1e-9) / 2**20
        say(f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB, {rate:.0f} MiB/s")
    for name in alpha_names(config):
        assert config.adaptive is not None
        writer.put(name, np.asarray(config.adaptive.alpha).astype(tensors[name].dtype).reshape(tensors[name].shape))


def _formed(name: str, value: np.ndarray, info: Info) -> np.ndarray:
    """`value` with the shape and dtype it goes out with; raises `Failed` rather than round."""
    if value.dtype != info.dtype:
        narrow = value.astype(info.dtype)
        if not same_bytes(narrow.astype(value.dtype), value):
            raise Failed(f"{name} came as {info.dtype} and has values now that {info.dtype} does not hold; the "
                         "checkpoint was changed after its conversion")
        value = narrow
    return value if value.shape == info.shape else value.reshape(info.shape)


def _variants(config: ModelConfig) -> list[str]:
    """One line for every field in which this model computes something else than the origin would."""
    origin, mine = preset(DEFAULTS).to_json(), config.to_json()
    fields = [(part, name) for part, names in _VARIANTS.items() if mine[part] for name in names]
    return [f"{part}.{name} is {mine[part][name]!r}; the origin computes with {origin[part][name]!r}"
            for part, name in fields if mine[part][name] != origin[part][name]]
