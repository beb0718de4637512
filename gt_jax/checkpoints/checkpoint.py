"""Checkpoints on disk: one Orbax pytree with a JSON object beside it, whole or not there at all.

- Trees are stored as nested dicts of arrays under the names of their paths, `params/segment0/layer0/gain`; named tuples
  and tuples become dicts, empty nodes vanish. A restore is told the structure, so it gives back what was saved.
- Everything is written under NAME.unfinished and renamed once complete; a killed save leaves only that name.
- The metadata (`config`, `step`, `kind`, ...) and files.json, every file with its size, are in the same rename: half a
  copy of a checkpoint is found out before a value is read. So is checksums.json, by which whoever reads finds out about
  bits that have changed.
- Arrays that are written value by value (`arrays`) lie in a folder each; here they become a checkpoint.
- The only file that imports Orbax; its logging stays silent, its errors become `Refused`, `Damaged` or `OSError`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import math
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gt_jax.checkpoints.checksums import THREADS, note_checksums, noted, of_values, refuse_changed_values
from gt_jax.checkpoints.folders import (
    CHUNK,
    UNFINISHED,
    Damaged,
    StrPath,
    prepare_parent,
    publish,
    remove,
    resolve,
    sync,
)
from gt_jax.checkpoints.leftovers import clear_save
from gt_jax.checkpoints.lock import only_writer
from gt_jax.checkpoints.slices import SliceReader, writing_axes
from gt_jax.checkpoints.tree_paths import combine_digests, differences, flatten, nest, storable
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.processes import ProcessGroup
from gt_jax.errors import Refused, refuse_all

_BROKEN = (ValueError, KeyError, TypeError, OSError)  # what Orbax and TensorStore raise on a broken file
_MOMENT = 0.2  # seconds
MODEL = ("params/", "statistics/")  # what paths of the model begin with
_SCRATCH = "metadata"  # the name, in an unfinished checkpoint, of what Orbax saves for its metadata alone

T = TypeVar("T")


class Model(NamedTuple):
    """What `load_model` gives."""

    config: ModelConfig
    params: dict[str, Any]
    statistics: dict[str, Any]
    metadata: dict[str, Any]


def save(path: StrPath, tree: Any, metadata: Mapping[str, Any]) -> None:
    """Write `tree` and the JSON object `metadata` at `path`; its parent folders are made.

    Raises `Refused` when the path exists, is being written, or its place is not writable, OSError when the disk is
    full; then nothing is left at `path`. On several processes every process calls it.
    """
    target, unfinished, leaves = _prepare(path, tree, metadata)

    def work() -> None:
        ocp.save(unfinished, nest(leaves), custom_metadata=dict(metadata))
        on_primary(functools.partial(_publish, unfinished, target, _model_shapes(leaves)))

    with only_writer(target):
        on_primary(functools.partial(_make_room, unfinished, target))
        _write(target, unfinished, work)


def save_async(path: StrPath, tree: Any, metadata: Mapping[str, Any]) -> Callable[[], None]:
    """`save` that returns once the values are copied from the devices, and writes on beside the caller.

    The function returned waits for the end of the writing and raises what `save` would have raised of it, or `Failed`
    with what another process had to raise; a checkpoint is there, whole, from the moment the writing ends. On several
    processes every process calls both. It is for the steps of a run: the caller holds the run's lock.
    """
    target, unfinished, leaves = _prepare(path, tree, metadata)
    on_primary(functools.partial(_make_room, unfinished, target))
    if jax.default_backend() == "cpu":  # there "from the devices" copies nothing, and the caller may donate its arrays
        leaves = {name: np.array(leaf) if _is_local(leaf) else leaf.copy() for name, leaf in leaves.items()}
    errors: list[Exception] = []
    model = _model_shapes(leaves)
    with _quiet(), _context():
        response = ocp.save_async(unfinished, nest(leaves), custom_metadata=dict(metadata))

    def finish() -> None:
        try:
            _write(target, unfinished, lambda: _publish_alone(response, unfinished, target, model))
        except Exception as error:  # noqa: BLE001 — raised again, where the caller waits
            errors.append(error)

    thread = threading.Thread(target=finish, name=f"saving {target.name}")
    thread.start()

    def outcome() -> None:
        if errors:
            raise errors[0]

    def wait() -> None:
        thread.join()
        ProcessGroup().agree(outcome)

    return wait


def _prepare(path: StrPath, tree: Any, metadata: Mapping[str, Any]) -> tuple[Path, Path, dict[str, Any]]:
    """(place, its name until it is whole, leaves by path) of a save."""
    target = Path(os.path.abspath(path))
    _refuse_existing(target)
    json.dumps(metadata)  # Orbax would find out too late
    leaves = storable(tree)
    prepare_parent(target)
    return target, target.with_name(target.name + UNFINISHED), leaves


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise Refused(f"{target} exists; a checkpoint is never overwritten, choose another path")


def _make_room(unfinished: Path, target: Path) -> None:
    """Clear what a killed save left; raises `Refused` where another command, or somebody, has the names."""
    _refuse_existing(target)  # another process may have finished it meanwhile
    clear_save(unfinished)


def _publish_alone(response: Any, unfinished: Path, target: Path, model: Mapping[str, Any]) -> None:
    """When all processes have written, one publishes; in a thread, where processes cannot wait for each other."""
    response.result()
    if jax.process_index() == 0:
        _publish(unfinished, target, model)


def _model_shapes(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()
            if name.startswith(MODEL)}


def _publish(unfinished: Path, target: Path, model: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Note what every file and every tensor of the model holds, then `publish`."""
    reader = SliceReader(unfinished, model)
    with ThreadPoolExecutor(THREADS) as pool:
        note_checksums(unfinished, dict(zip(model, pool.map(reader.checksum, model), strict=True)))
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
    tree = nest({name: np.zeros((), np.float32) for name in names})
    _write(folder, scratch, lambda: ocp.save(scratch, tree, custom_metadata=dict(metadata)), _context(database=False))
    if jax.process_index() != 0:
        return
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
    values differ from their checksums, unless the caller has compared all files (`compare` is False).
    """
    where = resolve(path)
    stored, _ = describe(where)
    read = _read_compared if compare else _read
    if abstract is None:
        return nest(read(where, {name: _on_host(leaf) for name, leaf in stored.items()}))
    wanted = flatten(abstract)
    refuse_all(differences(wanted, stored), f"checkpoint {where} does not hold what is asked for:")
    values = read(where, {name: _on_device(leaf) for name, leaf in wanted.items()})
    return jax.tree.unflatten(jax.tree.structure(abstract), [values[name] for name in wanted])


def load_paths(path: StrPath, paths: Collection[str]) -> dict[str, np.ndarray]:
    """Only the named leaves, as numpy arrays by path; raises `Refused` listing the ones that are not there."""
    where = resolve(path)
    stored, _ = describe(where)
    missing = [f"{name} is not in the checkpoint" for name in paths if name not in stored]
    refuse_all(missing, f"checkpoint {where}:")
    return _read_compared(where, {name: _on_host(stored[name]) for name in paths})


def read_leaves(path: StrPath, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """`load_paths` for a caller that keeps the description: no look at the folder before the read.

    Raises `Damaged` where values are not those whose checksums were noted.
    """
    values = _read(Path(path), {name: _on_host(leaf) for name, leaf in leaves.items()})
    refuse_changed_values(Path(path), {name: of_values(value) for name, value in values.items()}, noted(Path(path)))
    return values


def describe(path: StrPath) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """Shapes and dtypes by path, `params/segment0/...`, and the metadata; no values are read."""
    return described(resolve(path))


def described(where: Path) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """`describe` of a checkpoint of which it does not matter whether it is whole."""
    found = _look(where, functools.partial(_metadata, where))
    leaves = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flatten(found.metadata).items()}
    return dict(sorted(leaves.items())), dict(found.custom_metadata)


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
        own = {name: _on_host(leaf) for name, leaf in leaves.items() if name.startswith(MODEL)}
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
    return combine_digests({name: reader.digest(name) for name in chosen})


def _context(database: bool = True) -> ocp.Context:
    """Raw bytes (weights do not compress), no second copy in memory, and leaves that were not asked for stay unread.

    `database`: all arrays in one database, else each in a folder of its own.
    """
    context = ocp.Context()
    context.array.saving.use_ocdbt = database
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _chunks
    context.memory.deepcopy_host_arrays = False
    context.pytree.loading.partial_load = True
    context.asynchronous.create_directories_asynchronously = False  # else a failure is a wait of five minutes
    return context


def _chunks(key: Any, value: Any) -> Any:
    """A large array is stored in chunks that are runs of values in C order: a growth reads it in slices."""
    shape, itemsize = tuple(value.shape), np.dtype(value.dtype).itemsize
    if math.prod(shape) * itemsize <= CHUNK:
        return None
    axes = writing_axes(shape, itemsize, CHUNK)
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK, shard_axes=axes or None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs every save, and prints whole stacks for an error that it raises anyway."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    hook = sys.unraisablehook

    def unless_closed(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    sys.unraisablehook = unless_closed
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _with_orbax(work: Callable[[], T], failed: Callable[[Exception], Exception],
                context: ocp.Context | None = None) -> T:
    """`work()` in Orbax's context; what it raises for a broken file or disk is raised as `failed` says it.

    After an error, other reads and writes of the same call find their event loop closed, and futures and coroutines go
    unheard; Python prints each of them when the error is forgotten. So that happens here, where it is quiet.
    """
    with _quiet(), context or _context():
        try:
            return work()
        except _BROKEN as error:
            failure = failed(error)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            time.sleep(_MOMENT)
            gc.collect()
    raise failure


def _write(target: Path, unfinished: Path, work: Callable[[], None], context: ocp.Context | None = None) -> None:
    """Run `work`; what fails leaves nothing `unfinished`, and is an OSError if the operating system said so."""

    def failed(error: Exception) -> Exception:
        remove(unfinished)
        code = re.search(r"os_error_code='?(\d+)", str(error))
        number = int(code[1]) if code else getattr(error, "errno", None)
        if number is None:
            return error
        return OSError(number, f"{os.strerror(number)} while writing {target}; nothing is left there")

    _with_orbax(work, failed, context)


def _look(path: Path, work: Callable[[], T]) -> T:
    return _with_orbax(work, lambda error: Damaged(f"checkpoint {path} cannot be read: {error}"))


def _metadata(path: Path) -> Any:
    found = ocp.metadata(path)
    if found.metadata is None:  # Orbax logs why, and goes on
        raise ValueError("the values are not where its metadata says")
    return found


def _read(path: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    return _look(path, lambda: flatten(ocp.load(path, nest(abstract)))) if abstract else {}


def _read_compared(path: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """`_read`, refused where values differ from their checksums.

    Numpy arrays are compared as they are, what lies on devices as it lies on the disk: each process reads a share.
    Tensors of which nothing was noted pass: files would have to be read whole, for a few values too.
    """
    sums, group = noted(path), ProcessGroup()
    values = _read(path, abstract)
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
    refuse_changed_values(path, here, sums)
    return values


def _on_host(leaf: Any) -> np.ndarray:
    """Orbax restores where a numpy array stands as numpy; this one takes no memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _on_device(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return _on_host(leaf)
    sharding = getattr(leaf, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if sharding is None or (mesh is not None and mesh.empty):
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def on_primary(work: Callable[[], None]) -> None:
    """Run `work` on one process only; the others wait for it, and hear of its error."""
    ProcessGroup().on_first(work)
