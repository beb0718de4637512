"""Arrays written value by value and read slice by slice: the same values in C order, however chunks lie."""

import functools
import hashlib
import itertools
import math
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from orbax.checkpoint import v1 as ocp

from gt_jax.checkpoints import arrays, checkpoint, orbax_store
from gt_jax.checkpoints.arrays import ArrayFiles, chunk_shape
from gt_jax.checkpoints.folders import Damaged, publish
from gt_jax.checkpoints.slices import Slice, SliceReader, cut
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.growth.bounded_work import BoundedExecutor, Group
from gt_jax.growth.pipeline import pieces

METADATA = {"config": {}, "kind": "random"}
SHAPES = [(), (5,), (5, 7), (2, 20, 4, 6), (3, 1, 5), (7, 11), (1, 13, 3)]


def tree() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    values = {f"params/w{index}": random.normal(size=shape).astype(dtype) for index, (shape, dtype) in enumerate(
        itertools.product(SHAPES, (np.float32, ml_dtypes.bfloat16)))}
    return values | {"statistics/i": np.arange(300, dtype=np.int32).reshape(3, 100) - 7,
                     "statistics/u": np.arange(9, dtype=np.uint8), "statistics/b": np.asarray([True, False, True])}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 bytes."""
    monkeypatch.setattr(arrays, "CHUNK", 64)


def write(folder: Path, values: dict[str, np.ndarray]) -> Path:
    """A checkpoint of plain chunk files, written in pieces of seven values, the last ones first."""
    for name, value in values.items():
        files = ArrayFiles.of(folder / "state", name, value.shape, value.dtype)
        files.create()
        for start in reversed(range(0, value.size, 7)):
            files.write(start, value.reshape(-1)[start : start + 7])
        files.sync()
    checkpoint.write_metadata(folder, list(values), METADATA)
    publish(folder, folder.with_name("done"))
    return folder.with_name("done")


@pytest.mark.parametrize("limit", [8, 16, 40, 100, 10**6])
def test_slices_cover_an_array_in_order_by_whole_chunks(limit: int) -> None:
    for shape in SHAPES:
        value = np.arange(math.prod(shape)).reshape(shape)
        ones, halves = tuple(1 for _ in shape), tuple(max(1, size // 2) for size in shape)
        for chunk in (shape, ones, halves, chunk_shape(shape, 4, limit)):
            parts = list(cut("x", shape, chunk, limit // 4))
            np.testing.assert_array_equal(np.concatenate([value[part.index].reshape(-1) for part in parts]),
                                          value.reshape(-1))
            assert all((value[part.index].flat[0], value[part.index].size) == (part.start, part.count)
                       for part in parts)
            if chunk == ones:
                assert max(part.count for part in parts) <= max(limit // 4, 1)
        assert math.prod(chunk_shape(shape, 4, limit)) * 4 <= max(limit, 4)


def test_what_is_written_in_pieces_opens_with_every_call(tmp_path: Path, small: None) -> None:
    values = tree()
    place = write(tmp_path / "unfinished", values)
    assert len(list((place / "state" / "params.w6").glob("c.*"))) == 80  # [2, 20, 4, 6] float32: chunks of two rows
    stand_ins = nest({name: np.zeros_like(value) for name, value in values.items()})
    for loaded in (checkpoint.load(place), ocp.load(place, stand_ins), checkpoint.load(place, stand_ins)):
        for name, value in flatten(loaded).items():
            found = np.asarray(value)
            assert (found.dtype, found.shape, found.tobytes()) == (
                values[name].dtype, values[name].shape, values[name].tobytes()), name
    leaves, metadata = checkpoint.describe(place)
    assert metadata == METADATA and leaves.keys() == values.keys()
    checkpoint.save(tmp_path / "saved", nest(values), METADATA)
    assert checkpoint.content_hash(place) == checkpoint.content_hash(tmp_path / "saved")


def leaf_digest(name: str, value: np.ndarray) -> str:
    """SHA-256 of a whole leaf at once: path, shape, dtype and bytes in C order."""
    return hashlib.sha256(f"{name} {value.shape} {value.dtype}\n".encode() + value.tobytes()).hexdigest()


@pytest.mark.parametrize("saved_by_orbax", [False, True])
def test_digests_do_not_depend_on_slices_or_chunks(
        tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, saved_by_orbax: bool) -> None:
    values = tree()
    monkeypatch.setattr(orbax_store, "CHUNK", 64)
    if saved_by_orbax:
        place = tmp_path / "saved"
        checkpoint.save(place, nest(values), METADATA)
    else:
        place = write(tmp_path / "unfinished", values)
    reader = SliceReader(place, checkpoint.describe(place)[0])
    for name, value in values.items():
        assert reader.digest(name, 80) == leaf_digest(name, value)
        assert max(part.count for part in reader.slices(name, 80)) * value.itemsize <= 80, name


def test_chunks_of_large_arrays_are_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax cuts the longest axis first; ours are told where to cut before."""
    monkeypatch.setattr(orbax_store, "CHUNK", 2**12)
    shapes = [(2, 4, 10, 64), (64, 131), (2**13,), (1310, 16), (3, 2, 2**11), (2, 101, 70)]
    values = {f"w{index}": np.ones(shape, np.float32) for index, shape in enumerate(shapes)}
    checkpoint.save(tmp_path / "saved", values, METADATA)
    reader = SliceReader(tmp_path / "saved", checkpoint.describe(tmp_path / "saved")[0])
    for name in values:
        assert max(part.count for part in reader.slices(name, 2**12)) * 4 <= 2**12, name


def test_parts_of_a_chunk_that_is_kept_read_it_once(tmp_path: Path) -> None:
    """As the experts of a layer are read for an export, gate and up in turn, eight of them in a chunk."""
    values = {f"params/{name}": np.random.default_rng(0).normal(size=(1, 8, 2**12)) for name in ("gate", "up")}
    place = write(tmp_path / "unfinished", values)

    def bytes_read() -> int:
        metric, = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return metric["values"][0]["value"]

    reader, before = SliceReader(place, checkpoint.describe(place)[0], kept=2**20), bytes_read()
    for expert, name in itertools.product(range(8), values):
        part = reader.read(Slice(name, 0, 2**12, (0, expert)))()
        np.testing.assert_array_equal(part, values[name][0, expert])
    assert bytes_read() - before < 1.1 * sum(value.nbytes for value in values.values())


def test_what_cannot_be_read_is_damaged(tmp_path: Path, small: None) -> None:
    values = {"params/w": np.ones((5, 7), np.float32)}
    place = write(tmp_path / "unfinished", values)
    with pytest.raises(Damaged, match=r"params/w: it is float32\[5, 7\] on disk, not float32\[5, 8\]"):
        list(SliceReader(place, {"params/w": jax.ShapeDtypeStruct((5, 8), np.float32)}).slices("params/w"))
    reader = SliceReader(place, checkpoint.describe(place)[0])
    chunk = sorted((place / "state" / "params.w").glob("c.*"))[0]
    chunk.write_bytes(chunk.read_bytes()[:-4])
    with pytest.raises(Damaged, match="params/w"):
        reader.digest("params/w")
    with pytest.raises(Damaged, match="bytes instead of"):
        checkpoint.describe(place)
    (place / "state" / "_METADATA").unlink()
    with pytest.raises(Damaged, match="cannot be read"):
        SliceReader(place, {})


def test_pieces_stay_in_a_block_and_have_a_largest_size() -> None:
    for start, count, block in ((0, 1000, 1000), (30, 500, 100), (5, 7, 3), (0, 1, 1)):
        found = list(pieces(start, count, block, 64))
        assert found[0][0] == start and found[-1][1] == start + count
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(found))
        assert all(begin // block == (end - 1) // block and 0 < end - begin <= 64 for begin, end in found)


def test_work_is_bounded_and_its_errors_come_back() -> None:
    held, most, lock, gate = 0, 0, threading.Lock(), threading.Event()

    def task() -> None:
        nonlocal held, most
        with lock:
            held += 10
            most = max(most, held)
        gate.wait(0.01)
        with lock:
            held -= 10

    with BoundedExecutor(25, 3) as executor:
        for _ in range(20):
            executor.submit(10, task)
        executor.wait()
        assert held == 0 and 10 <= most <= 20
        executor.submit(100, lambda: None)  # larger than the bound, alone
        executor.submit(1, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            executor.wait()
        with pytest.raises(ZeroDivisionError):
            executor.submit(1, task)


def test_a_result_that_is_kept_holds_its_bytes() -> None:
    with BoundedExecutor(25, 1) as executor:
        assert executor.submit(20, lambda: 7, keep=True).result() == 7
        assert executor.fits(5) and not executor.fits(10)
        executor.release(20)
        assert executor.fits(10)


def test_a_group_is_done_after_its_last_task_and_never_after_a_failure() -> None:
    done: list[str] = []
    gate = threading.Event()
    with BoundedExecutor(100, 2) as one, BoundedExecutor(100, 1) as other:
        names = ("whole", "failed", "dropped")
        whole, failed, dropped = (Group(functools.partial(done.append, name)) for name in names)
        one.submit(1, gate.wait, whole)
        hashed = other.submit(1, lambda: None, whole)
        hashed.result()
        whole.close()
        assert not done
        gate.set()
        one.wait()
        assert done == ["whole"]
        gate.clear()
        one.submit(1, gate.wait)
        one.submit(1, lambda: gate.wait() and 1 / 0, failed)
        one.submit(1, lambda: None, dropped)
        failed.close()
        dropped.close()
        gate.set()
    assert "failed" not in done
    gate.clear()
    with BoundedExecutor(100, 1) as executor, pytest.raises(OSError, match="full"):
        bad = Group(lambda: (_ for _ in ()).throw(OSError("full")))
        executor.submit(1, gate.wait, bad)
        bad.close()
        gate.set()
        executor.wait()
