"""From the origin's files to a checkpoint of ours, leaf by leaf.

- Everything is checked before anything is written: names, shapes, dtypes, aliases, config; one refusal lists it all.
- Held at a time: one tensor of the origin, that is, one block of a leaf; the sources are mapped, never read as a whole.
  `3b` needs 1 GiB, for its unembedding, beside the program.
- TARGET is there when it is whole; a kill leaves TARGET.converting, which the next try clears.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
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
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.tokenizer_file import unpacked
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import explain_full_disk
from gt_jax.interop.expected_tensors import (
    TOKENS,
    Expected,
    block_shape,
    expect,
    mismatches,
    origin_infos,
    pass_strengths,
)
from gt_jax.interop.inferred_config import infer
from gt_jax.interop.shards import Source, summary
from gt_jax.interop.tensor_files import Info, groups
from gt_jax.interop.tensor_names import Leaf
from gt_jax.text.tokenizers import chosen_tokenizer, known_tokenizer, open_file, open_tokenizer

Progress = Callable[[str], None]


def to_orbax(sources: Sequence[StrPath], target: StrPath, *, overrides: Mapping[str, Any] | None = None,
             step: int | None = None, tokens: Sequence[bytes] | None = None, tokenizer: str | None = None,
             progress: Progress | None = None) -> dict[str, Any]:
    """Write the checkpoint `target` from the origin's files; returns a report.

    `overrides` are config fields; `step` is what the metadata say (else what the file says, else 0); `tokens` the
    bytes of every token, for a Kronecker embedding (else those of the tokenizer that is named or came along, else the
    default of `text.token_bytes`, which is said); `tokenizer` is noted, for the commands that read text. What a file of
    ours says of how its model came to be is kept as the `lineage`. Raises `Refused` that lists everything that does not
    fit, with nothing written.
    """
    say = progress or (lambda line: None)
    started = time.monotonic()
    place = refuse_existing(target)
    source = Source([Path(path) for path in sources])
    for note in source.notes:
        say(note)
    config, expected = _check(source, overrides, say)
    forms = _forms(source, origin_infos(expected, config))
    found = source.step or 0
    metadata: dict[str, Any] = {
        "config": config.to_json(), "kind": "converted", "step": found if step is None else step,
        "converted_from": {**summary(source), "forms": forms}}
    if source.lineage is not None:
        metadata[LINEAGE] = source.lineage
    if tokenizer is not None:
        metadata["tokenizer"] = chosen_tokenizer(metadata, tokenizer, ", ".join(map(str, sources)))
    if tokens is None and expected.tokens:
        tokens = _texts(metadata, tokenizer, ", ".join(map(str, sources)), say)
    own = _own(expected, config, tokens)
    checksums = all(file.has_checksums for file in source.files)
    if not checksums:
        say("the source has no checksums; its values are taken as they are")
    with parent_made(place), only_writer(place), explain_full_disk(place, "do it again"):
        refuse_existing(place)  # another process may have finished it meanwhile
        _write(source, place, expected, own, metadata, say)
    return {"source": [str(path) for path in sources], "target": str(place), "step": metadata["step"],
            "tensors": len(source.places), "aliases": source.aliases(), "ignored": len(source.ignored),
            "leaves": len(expected.tensors), "bytes": sum(map(_nbytes, expected.tensors.values())),
            "source_checksums": checksums, "seconds": time.monotonic() - started, "config": config.to_json()}


def refuse_existing(target: StrPath) -> Path:
    """The absolute path of a target that is not there yet."""
    place = Path(os.path.abspath(target))
    if os.path.lexists(place):
        raise Refused(f"target {place} exists; nothing is ever overwritten, choose another target")
    return place


def _check(source: Source, overrides: Mapping[str, Any] | None, say: Progress) -> tuple[ModelConfig, Expected]:
    """Config and leaves of the model in `source`; raises `Refused` that lists all that is wrong."""
    alpha, problems = pass_strengths(source)
    config, wrong = infer(source.tensors, alpha, overrides, source.config)
    say(f"{len(source.places)} tensors of layout {config.layout}, width {config.width}")
    expected = expect(config)
    problems += wrong + mismatches(source, expected, config)
    problems += [f"{path} of this config has no counterpart in the origin" for path in expected.foreign]
    if source.aliases():
        say(f"comparing {source.aliases()} tensors that came under a second name")
    problems += source.differing_aliases()
    refuse_all(problems, f"{', '.join(str(file.path) for file in source.files)} cannot be converted as layout "
                         f"{config.layout}, width {config.width}:")
    return config, expected


def _forms(source: Source, written: Mapping[str, Info]) -> dict[str, list[Any]]:
    """[dtype, shape] of every tensor that is not as we would write it: what the way back needs to be bit-exact."""
    return {name: [str(info.dtype), list(info.shape)] for name, info in source.tensors.items() if info != written[name]}


def _texts(metadata: Mapping[str, Any], tokenizer: str | None, sources: str, say: Progress) -> list[bytes] | None:
    """The bytes of the tokens of the tokenizer that is named, or that came along; None, and a word, where none did."""
    known = known_tokenizer(metadata)
    if tokenizer is None and known is None:
        say("nothing says which bytes the tokens have, which the embedding reads: token i below 256 is taken for byte "
            "i; --tokenizer or --tokens say otherwise")
        return None
    if tokenizer is None and known is not None and known.packed is not None:  # the file itself came along
        return open_file(unpacked(known)).texts()
    return open_tokenizer(chosen_tokenizer(metadata, tokenizer, sources)).texts()


def _own(expected: Expected, config: ModelConfig, tokens: Sequence[bytes] | None) -> dict[str, np.ndarray]:
    """The leaves that the origin does not have: gains of 1, and the bytes of the tokens."""
    made = {path: np.ones(expected.tensors[path].shape, expected.tensors[path].dtype) for path in expected.gains}
    if not expected.tokens:
        if tokens is not None:
            raise Refused("token texts have no meaning for this model; its embedding is a plain table")
        return made
    from gt_jax.text.token_bytes import filled, token_table

    if tokens is not None and len(tokens) > config.vocab:
        raise Refused(f"there are {len(tokens)} token texts; the model has a vocabulary of {config.vocab}")
    texts = filled(tokens or (), config.vocab)
    return made | dict(zip(TOKENS, map(np.asarray, token_table(texts, config.embedding.token_bytes)), strict=True))


def _write(source: Source, place: Path, expected: Expected, own: Mapping[str, np.ndarray],
           metadata: Mapping[str, Any], say: Progress) -> None:
    """Leaf by leaf in the stage's folder, then one rename; whatever fails leaves nothing."""
    stage = place.with_name(place.name + CONVERTING)
    clear(stage, (ARRAYS, EMPTY), f"the conversion to {place.name}")
    arrays = {path: ArrayFiles.of(stage / "state", path, tuple(tensor.shape), np.dtype(tensor.dtype))
              for path, tensor in expected.tensors.items()}
    written = Written(stage)
    total, done = sum(map(_nbytes, expected.tensors.values())), sum(value.nbytes for value in own.values())
    started = time.monotonic()
    try:
        for path, value in own.items():
            arrays[path].create()
            arrays[path].write(0, value, written)
            arrays[path].sync()
        for group in groups(expected.leaves, lambda leaf: _nbytes(expected.tensors[leaf.path])):
            for leaf in group:
                _convert(source, leaf, expected.tensors[leaf.path], arrays[leaf.path], written)
                done += _nbytes(expected.tensors[leaf.path])
            rate = done / max(time.monotonic() - started, 1e-9) / 2**20
            say(f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB, {rate:.0f} MiB/s")
        checkpoint.write_metadata(stage, list(expected.tensors), metadata)
        note_checksums(stage, *sums_of_arrays(stage, arrays, written.pieces()))
        publish(stage, place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _convert(source: Source, leaf: Leaf, tensor: Any, files: ArrayFiles, written: Written) -> None:
    """One leaf of ours from the tensors of its blocks, a block at a time."""
    files.create()
    shape = block_shape(leaf, tensor)
    for block, name in enumerate(leaf.origins):
        value = leaf.transform.to_ours(source.read(name), shape)
        files.write(block * value.size, value.astype(files.dtype, copy=False), written)
    files.sync()


def _nbytes(tensor: Any) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
