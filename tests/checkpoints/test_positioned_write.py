"""Bytes written at a place, whichever way they go to the disk."""

import errno
import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gt_jax.checkpoints import positioned_write
from gt_jax.checkpoints.positioned_write import BLOCK, write_at

SIZE = 40 * BLOCK + 123


@pytest.fixture(autouse=True)
def small_direct_writes(monkeypatch):
    monkeypatch.setattr(positioned_write, "DIRECT", 2 * BLOCK)
    monkeypatch.setattr(positioned_write, "_STEP", 4 * BLOCK)


def written_in_pieces(file, seed):
    """Random bytes written by four threads in pieces of any size, in any order; what they should have made."""
    rng = random.Random(seed)
    wanted = np.random.default_rng(seed).integers(0, 256, SIZE, np.uint8)
    cuts = [0, *sorted(rng.sample(range(1, SIZE), 9)), SIZE]
    pieces = list(itertools.pairwise(cuts))
    rng.shuffle(pieces)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda piece: write_at(file, piece[0], wanted[slice(*piece)].data, SIZE), pieces))
    return wanted.tobytes()


@pytest.mark.parametrize("seed", range(10))
def test_pieces_of_any_size_and_order_make_the_file(tmp_path, seed):
    assert (wanted := written_in_pieces(tmp_path / "c", seed)) == (tmp_path / "c").read_bytes()
    assert len(wanted) == SIZE


def test_whole_blocks_go_past_the_page_cache_and_the_rest_through_it(tmp_path, monkeypatch):
    """All that begins and ends at a block does, where the file system can; the edges do not."""
    seen, pwrite = [], os.pwrite
    direct = getattr(os, "O_DIRECT", 0)
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | direct))
    except OSError:
        direct = 0
    if not direct:
        pytest.skip("this file system writes through the page cache alone")
    import fcntl

    def watched(handle, data, offset):
        seen.append((bool(fcntl.fcntl(handle, fcntl.F_GETFL) & direct), offset, len(data)))
        return pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    write_at(tmp_path / "c", 100, memoryview(bytes(6 * BLOCK)), SIZE)
    assert sorted(seen) == [(False, 100, BLOCK - 100), (False, 6 * BLOCK, 100), (True, BLOCK, 4 * BLOCK),
                            (True, 5 * BLOCK, BLOCK)]


@pytest.mark.parametrize("how", ["no flag", "open refuses", "write refuses", "half a block"])
def test_a_file_system_that_does_not_write_directly_gets_the_same_bytes(tmp_path, monkeypatch, how):
    opened, pwrite, calls = os.open, os.pwrite, []

    def open_refused(file, flags, *mode):
        if flags & positioned_write._O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(file, flags, *mode)

    def write_refused(handle, data, offset):
        calls.append(offset)
        if len(calls) == 2:  # the second direct one
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwrite(handle, data, offset)

    def write_half(handle, data, offset):
        return pwrite(handle, data[: max(len(data) // 2, 1)], offset)

    if how == "no flag":
        monkeypatch.setattr(positioned_write, "_O_DIRECT", 0)
    elif how == "open refuses":
        monkeypatch.setattr(positioned_write, "_O_DIRECT", os.O_EXCL)  # any flag that no other call sets
        monkeypatch.setattr(os, "open", open_refused)
    elif how == "write refuses":
        monkeypatch.setattr(positioned_write, "_O_DIRECT", os.O_CLOEXEC)  # one that changes nothing
        monkeypatch.setattr(os, "pwrite", write_refused)
    else:
        monkeypatch.setattr(os, "pwrite", write_half)
    data = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).data
    write_at(tmp_path / "c", 0, data, SIZE)
    assert data.tobytes() == (tmp_path / "c").read_bytes()


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(handle, data, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write_at(tmp_path / "c", 0, memoryview(bytes(SIZE)), SIZE)
