"""Checkpoints on disk: one Orbax pytree with a JSON object beside it, whole or not there at all.

- Trees are stored as nested dicts of arrays under the names of their paths, `params/segment0/layer0/gain`; named tuples
  and tuples become dicts, empty nodes vanish. A restore is told the structure, so it gives back what was saved.
- Everything is written under NAME.unfinished and renamed once complete; a killed save leaves only that name.
- The metadata (`config`, `step`, `kind`, ...) and files.json, every file with its size, are in the same rename: half a
  copy of a checkpoint is found out before a value is read. So is checksums.json, by which whoever reads finds out about
  bits that have changed.
- Arrays that are written value by value (`arrays`) lie in a folder each; here they become a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gt_jax.checkpoints import orbax_store
from gt_jax.checkpoints.checksums import (
    THREADS,
    checked_files,
    note_checksums,
    noted,
    of_values,
    refuse_changed_description,
    refuse_changed_files,
    refuse_changed_values,
)
from gt_jax.checkpoints.folders import (
    UNFINISHED,
    StrPath,
    prepare_parent,
    publish,
    remove,
    resolve,
    sync,
)
from gt_jax.checkpoints.leftovers import clear_save
from gt_jax.checkpoints.lock import is_held, only_writer
from gt_jax.checkpoints.moments import stored_moments
from gt_jax.checkpoints.slices import SliceReader
from gt_jax.checkpoints.tree_paths import combine_digests, differences, flatten, nest, storable
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.tokenizer_file import TokenizerFile, as_stored, carried_tokenizer, to_store
from gt_jax.devices.processes import ProcessGroup, end_together
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import explain_full_disk, refuse_address

MODEL = ("params/", "statistics/")  # what paths of the model begin with
_SCRATCH = "metadata"  # the name, in an unfinished checkpoint, of what Orbax saves for its metadata alone


class Model(NamedTuple):
    """What `load_model` gives."""

    config: ModelConfig
    params: dict[str, Any]
    statistics: dict[str, Any]
    metadata: dict[str, Any]


def save(path: StrPath, tree: Any, metadata: Mapping[str, Any], *, held: bool = False) -> None:
    """Write `tree` and the JSON object `metadata` at `path`; its parent folders are made.

    `held`: the caller is `only_writer` of the path already, since before the work whose end this is. Raises `Refused`
    when the path exists, is being written, or its place is not writable, OSError when the disk is full; then nothing
    is left at `path`. On several processes every process calls it.
    """
    target, unfinished, leaves, metadata, tokenizer = _prepare(path, tree, metadata)

    def work() -> None:
        orbax_store.save(unfinished, leaves, metadata)
        on_primary(functools.partial(_publish, unfinished, target, _carried_shapes(leaves), tokenizer))

    with contextlib.nullcontext() if held else only_writer(target), explain_full_disk(target, "do it again"):
        on_primary(functools.partial(_make_room, unfinished, target))
        orbax_store.write(target, unfinished, work)


class Writing(NamedTuple):
    """A save that goes on in a thread of its own, and what went wrong in it."""

    thread: threading.Thread
    errors: list[Exception]

    def join(self) -> None:
        """Wait for this process's part of it, whatever becomes of it."""
        self.thread.join()

    def __call__(self) -> None:
        """Wait for the end; raises what `save` would have raised, or `Failed` with what another process had to raise.

        On several processes every process calls it.
        """
        self.join()
        ProcessGroup().agree(self._outcome)

    def _outcome(self) -> None:
        if self.errors:
            raise self.errors[0]


def save_async(path: StrPath, tree: Any, metadata: Mapping[str, Any]) -> Writing:
    """`save` that returns once the values are copied from the devices, and writes on beside the caller.

    A checkpoint is there, whole, from the moment the writing ends. On several processes every process calls it. It is
    for the steps of a run: the caller holds the run's lock.
    """
    target, unfinished, leaves, metadata, tokenizer = _prepare(path, tree, metadata)
    on_primary(lambda: _refuse_held(target))
    on_primary(functools.partial(_make_room, unfinished, target))
    if jax.default_backend() == "cpu":  # there "from the devices" copies nothing, and the caller may donate its arrays
        leaves = {name: np.array(leaf) if _is_local(leaf) else leaf.copy() for name, leaf in leaves.items()}
    errors: list[Exception] = []
    carried = _carried_shapes(leaves)
    response = orbax_store.save_async(unfinished, leaves, metadata)

    def finish() -> None:
        try:
            orbax_store.write(
                target, unfinished, lambda: _publish_alone(response, unfinished, target, carried, tokenizer))
        except Exception as error:  # noqa: BLE001 — raised again, where the caller waits
            errors.append(error)
            end_together(error)  # the others would wait for this one's files

    thread = threading.Thread(target=finish, name=f"saving {target.name}")
    thread.start()
    return Writing(thread, errors)


def _prepare(
    path: StrPath, tree: Any, metadata: Mapping[str, Any]
) -> tuple[Path, Path, dict[str, Any], dict[str, Any], TokenizerFile | None]:
    """(place, its name until it is whole, leaves by path, metadata, tokenizer to carry) of a save."""
    refuse_address(path)
    target = Path(os.path.abspath(path))
    _refuse_existing(target)
    json.dumps(metadata)  # Orbax would find out too late
    leaves = storable(tree)
    prepare_parent(target, of_run=metadata.get("kind") == "train")
    tokenizer = carried_tokenizer(metadata)
    return target, target.with_name(target.name + UNFINISHED), leaves, to_store(metadata, tokenizer), tokenizer


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise Refused(f"{target} exists; a checkpoint is never overwritten, choose another path")


def _refuse_held(target: Path) -> None:
    if is_held(target):
        raise Refused(f"another process is writing {target} at this moment; it is a step of a run, write elsewhere")


def _make_room(unfinished: Path, target: Path) -> None:
    """Clear what a killed save left; raises `Refused` where another command, or somebody, has the names."""
    _refuse_existing(target)  # another process may have finished it meanwhile
    clear_save(unfinished)


def _publish_alone(
    response: Any, unfinished: Path, target: Path, carried: Mapping[str, Any], tokenizer: TokenizerFile | None
) -> None:
    """When all processes have written, one publishes; in a thread, where processes cannot wait for each other."""
    response.result()
    if jax.process_index() == 0:
        _publish(unfinished, target, carried, tokenizer)


def _carried_shapes(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Of what others read, too, and not only the run that goes on: the model, second moments and copies of weights."""
    names = [name for name in leaves if name.startswith(MODEL)]
    if (moments := stored_moments(leaves)) is not None:
        names += [*moments.second.values(), *moments.copies.values(), moments.updates]
    return {name: jax.ShapeDtypeStruct(leaves[name].shape, leaves[name].dtype) for name in dict.fromkeys(names)}


def _publish(
    unfinished: Path, target: Path, carried: Mapping[str, jax.ShapeDtypeStruct], tokenizer: TokenizerFile | None
) -> None:
    """Put the tokenizer beside, note what every file and every tensor that is carried on holds, then `publish`."""
    if tokenizer is not None:
        (unfinished / tokenizer.name).write_bytes(tokenizer.content)
    reader = SliceReader(unfinished, carried)
    with ThreadPoolExecutor(THREADS) as pool:
        note_checksums(unfinished, dict(zip(carried, pool.map(reader.checksum, carried), strict=True)))
    publish(unfinished, target)


def _is_local(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def write_metadata(folder: Path, names: Collection[str], metadata: Mapping[str, Any]) -> None:
    """Make a checkpoint of the arrays `names` that lie in `folder`/state, each in a folder of its own.

    Orbax saves a tree of the same structure with a number for each array; its files are taken over, all but the
    numbers. On several processes every process calls it, and process 0 makes the changes. The caller publishes it.
    """
    scratch = folder / _SCRATCH
    on_primary(functools.partial(remove, scratch))
    tokenizer = carried_tokenizer(metadata)
    metadata = to_store(metadata, tokenizer)
    numbers = {name: np.zeros((), np.float32) for name in names}
    orbax_store.write(folder, scratch, lambda: orbax_store.save(scratch, numbers, metadata), database=False)
    if jax.process_index() != 0:
        return
    if tokenizer is not None:
        (folder / tokenizer.name).write_bytes(tokenizer.content)
    for file in sorted(scratch.rglob("*")):
        if file.is_file() and file.relative_to(scratch).parts[0] != "state":
            sync(file)
            os.replace(file, folder / file.relative_to(scratch))
    sync(scratch / "state" / "_METADATA")
    os.replace(scratch / "state" / "_METADATA", folder / "state" / "_METADATA")
    sync(folder / "state")
    remove(scratch)


def load(path: StrPath, abstract: Any = None, compare: bool = True) -> Any:
    """The arrays of a checkpoint or of a run's newest step.

    Without `abstract`: nested dicts of numpy arrays. With it (a pytree of `jax.ShapeDtypeStruct`, their shardings, or
    of numpy arrays): the same structure, each leaf restored as its stand-in says; leaves it does not name stay unread.
    Raises `Refused` that lists every leaf whose path, shape or dtype the checkpoint does not have, and `Damaged` where
    values differ from their checksums, unless the caller has compared all files (`compare` is False). On several
    processes every process calls it, or all wait; `load_paths` is for one alone.
    """
    where = resolve(path)
    stored, _ = describe(where)
    read = _read_compared if compare else orbax_store.read
    if abstract is None:
        return nest(read(where, {name: orbax_store.on_host(leaf) for name, leaf in stored.items()}))
    wanted = flatten(abstract)
    refuse_all(differences(wanted, stored), f"checkpoint {where} does not hold what is asked for:")
    values = read(where, {name: orbax_store.on_device(leaf) for name, leaf in wanted.items()})
    return jax.tree.unflatten(jax.tree.structure(abstract), [values[name] for name in wanted])


def load_paths(path: StrPath, paths: Collection[str]) -> dict[str, np.ndarray]:
    """Only the named leaves, as numpy arrays by path; raises `Refused` listing the ones that are not there.

    Raises `Damaged` where values are not those whose checksums were noted. One process of several may call it alone:
    Orbax would wait for the others.
    """
    where = resolve(path)
    stored, _ = describe(where)
    missing = [f"{name} is not in the checkpoint" for name in paths if name not in stored]
    refuse_all(missing, f"checkpoint {where}:")
    reader = SliceReader(where, stored)
    values = {name: reader.whole(name) for name in paths}
    refuse_changed_values(where, {name: of_values(value) for name, value in values.items()}, reader.noted)
    if reader.noted.lacks(paths):
        refuse_changed_files(where)
    return values


def read_leaves(path: StrPath, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """`load_paths` for a caller that keeps the description: no look at the folder before the read.

    Raises `Damaged` where values are not those whose checksums were noted; where files alone have some, the caller has
    compared them.
    """
    values = orbax_store.read(Path(path), {name: orbax_store.on_host(leaf) for name, leaf in leaves.items()})
    refuse_changed_values(Path(path), {name: of_values(value) for name, value in values.items()}, noted(Path(path)))
    return values


def describe(path: StrPath) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """Shapes and dtypes by path, `params/segment0/...`, and the metadata; no values are read.

    Raises `Damaged` where the files that say this are not those that were written.
    """
    where = resolve(path)
    refuse_changed_description(where)
    return described(where)


def described(where: Path) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """`describe` of a checkpoint of which it does not matter whether it is whole."""
    found, metadata = orbax_store.metadata(where)
    leaves = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in found.items()}
    return dict(sorted(leaves.items())), as_stored(metadata, where)


def load_model(path: StrPath, abstract: Any = None) -> Model:
    """Config, `params`, `statistics` and metadata of a model or training checkpoint, or of a run's newest step.

    `abstract` is {"params": ..., "statistics": ...} as for `load`. Raises `Refused` when the stored config does not
    parse or does not fit the tensors beside it.
    """
    where = resolve(path)
    leaves, metadata = describe(where)
    config = model_config(where, leaves, metadata)
    if abstract is not None:
        tree = load(where, abstract)
    else:
        own = {name: orbax_store.on_host(leaf) for name, leaf in leaves.items() if name.startswith(MODEL)}
        tree = nest(_read_compared(where, own))
    return Model(config, tree["params"], tree.get("statistics", {}), metadata)


def model_config(path: StrPath, leaves: Mapping[str, Any], metadata: Mapping[str, Any]) -> ModelConfig:
    """The config stored beside the tensors; raises `Refused` when it does not parse or the tensors contradict it."""
    if not isinstance(metadata.get("config"), Mapping):
        raise Refused(f"checkpoint {path} carries no model config; was it written by another program?")
    try:
        config = ModelConfig.from_json(metadata["config"])
    except Refused as error:
        raise Refused(f"checkpoint {path}: {error}") from error
    expected: dict[str, tuple[int, ...]] = {}
    if "table" in config.embedding.kind:
        expected["params/embedding/table"] = (config.vocab, config.width)
    if "kronecker" in config.embedding.kind:
        expected["params/embedding/kronecker/w"] = (256, config.embedding.token_bytes, config.width)
    problems = []
    for index, segment in enumerate(config.depth.segments):
        for slot in range(len(segment.pattern)):
            name = f"params/segment{index}/layer{slot}/gain"
            expected[name] = (segment.repeats,)
    for name, shape in expected.items():
        if name not in leaves:
            problems.append(f"{name} is missing; the config's layout {config.layout} has it")
        elif tuple(leaves[name].shape) != shape:
            problems.append(f"{name} has shape {tuple(leaves[name].shape)}; the config says {shape}")
    refuse_all(problems, f"checkpoint {path} does not fit its own config:")
    return config


def content_hash(path: StrPath, under: Collection[str] | None = None) -> str:
    """SHA-256 over sorted paths, shapes, dtypes and values, the same however the checkpoint is laid out on disk.

    `under` limits it to top-level keys, for example ("params", "statistics"). One slice is in memory at a time.
    """
    where = resolve(path)
    leaves, _ = describe(where)
    chosen = [name for name in leaves if under is None or name.split("/")[0] in under]
    reader = SliceReader(where, leaves)
    if reader.noted.lacks(chosen):
        refuse_changed_files(where)
    return combine_digests({name: reader.digest(name) for name in chosen})


def _read_compared(path: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """`orbax_store.read`, refused where values differ from their checksums.

    Numpy arrays are compared as they are, what lies on devices as it lies on the disk: each process reads a share.
    Where a tensor has no checksum but its files have, all files are compared too.
    """
    sums, group = noted(path), ProcessGroup()
    values = orbax_store.read(path, abstract)
    known = {name: value for name, value in values.items() if name in sums.tensors}
    here = {name: of_values(value) for name, value in known.items() if isinstance(value, np.ndarray)}
    devices = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in known.items()
               if name not in here}
    if devices:
        reader = SliceReader(path, devices)
        share = group.share({name: math.prod(leaf.shape) * leaf.dtype.itemsize for name, leaf in devices.items()})
        with ThreadPoolExecutor(THREADS) as pool:
            sums_read = group.agree(lambda: dict(zip(share, pool.map(reader.checksum, share), strict=True)))
        for part in group.gather(sums_read):
            here |= part
    refuse_changed_values(path, here, sums)  # before the files: it names the tensor
    if sums.lacks(abstract):
        group.agree(lambda: refuse_changed_files(path, group.share(checked_files(path))))
    return values


def on_primary(work: Callable[[], object]) -> None:
    """Run `work` on one process only; the others wait for it, and hear of its error."""
    ProcessGroup().on_first(work)
