"""The format: what the reference implementation writes is read, what is written it reads; damage is found."""

import contextlib
import json
import struct
import zlib

import ml_dtypes
import numpy as np
import pytest

from gt_jax.interop import safetensors, tensor_files
from gt_jax.interop.safetensors import SafetensorsFile, Writer
from gt_jax.interop.tensor_files import Info, Unreadable, checksum, groups, in_order, let_go, pieces, same_bytes
from tests.interop import origin

VALUES = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4), "scalar": np.array(2.5, ml_dtypes.bfloat16),
    "odd": np.arange(5, dtype=ml_dtypes.bfloat16), "bytes": np.arange(7, dtype=np.uint8),
    "empty": np.zeros((0, 3), np.float32), "half": np.array([1, np.nan], np.float16), "yes": np.array([True, False]),
    "wide": np.array([1e300]), "whole": np.array([[-(2**40)]]),
}  # fmt: skip


def assert_holds(file, values):
    assert file.tensors == {name: Info(value.shape, value.dtype) for name, value in values.items()}
    for name, value in values.items():
        assert file.read(name).tobytes() == value.tobytes() and file.read(name).shape == value.shape


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    infos = {name: Info(value.shape, value.dtype) for name, value in VALUES.items()}
    with Writer(path, infos, {"width": 4}, 12) as writer:
        for name in reversed(VALUES):  # any order, any strides
            value = VALUES[name]
            writer.put(name, np.asfortranarray(value) if value.ndim == 2 else value)
    found = SafetensorsFile(path)
    assert_holds(found, VALUES)
    assert (found.step, found.config) == (12, {"width": 4})
    assert all(not found.read(name).flags.writeable for name in VALUES if VALUES[name].size)


def test_a_writer_demands_every_tensor_as_announced(tmp_path):
    info = {"a": Info((2,), np.dtype("float32"))}
    with pytest.raises(ValueError, match="not written: a"), Writer(tmp_path / "a", info):
        pass
    with pytest.raises(ValueError, match="the header says float32"), Writer(tmp_path / "a", info) as writer:
        writer.put("a", np.zeros(3, np.float32))


def test_large_tensors_go_in_pieces(monkeypatch):
    monkeypatch.setattr(tensor_files, "CHUNK", 40)
    random = np.random.default_rng(0)
    for value in (random.normal(size=(7, 5)), random.normal(size=(5, 7)).T, random.normal(size=(3, 2, 9))[:, ::-1],
                  random.normal(size=100), np.array(1.0), np.zeros((0, 4)), random.normal(size=(1, 1, 30))):
        found = list(pieces(value))
        assert b"".join(piece.tobytes() for piece in found) == value.tobytes()
        assert all(piece.nbytes <= 40 for piece in found)
        assert same_bytes(value, value.copy()) and (not value.size or not same_bytes(value, np.asarray(value + 1)))


def test_groups_keep_order_and_limit():
    assert list(groups([3, 4, 9, 1, 1, 8], lambda size: size, 9)) == [[3, 4], [9], [1, 1], [8]]
    assert list(groups([], lambda size: size, 9)) == []


def test_agrees_with_the_reference_implementation(tmp_path):
    reference = pytest.importorskip("safetensors.numpy")
    reference.save_file({"b": VALUES["matrix"], "a": VALUES["bytes"]}, tmp_path / "theirs.safetensors")
    assert_holds(SafetensorsFile(tmp_path / "theirs.safetensors"), {"a": VALUES["bytes"], "b": VALUES["matrix"]})
    origin.write(tmp_path / "ours.safetensors", VALUES)
    found = reference.load_file(tmp_path / "ours.safetensors")
    assert found.keys() == VALUES.keys()
    assert all(found[name].tobytes() == value.tobytes() for name, value in VALUES.items())


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("header,data,words", [
    ({"a": entry([2], 0, 8)}, b"1234", "truncated: its header needs 8 bytes of tensors, the file has 4"),
    ({"a": entry([2], 0, 8)}, b"123456789", "1 bytes after its last tensor"),
    ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12, "overlap or leave a gap at byte 8"),
    ({"a": entry([2], 4, 12)}, b"0" * 12, "gap at byte 0"),
    ({"a": entry([3], 0, 8)}, b"0" * 8, "a is float32.3., 12 bytes; the header gives it 8"),
    ({"a": entry([2], 0, 8, "F8_E4M3")}, b"0" * 8, "a has dtype F8_E4M3; known are BF16"),
    ({"a": {"dtype": "F32"}}, b"", "entry of a does not parse"), ({"a": entry([-2], 0, -8)}, b"", "does not parse"),
    ({"a": entry([True], 0, 4)}, b"0000", "does not parse"), ([1], b"", "no JSON object"),
    (b"{no", b"", "no JSON object"), (b'{"a": 1, "a": 2}', b"", "'a' twice"),
    ({"__metadata__": {"gt_jax.step": "x"}}, b"", "__metadata__ does not parse"),
    ({"__metadata__": {"gt_jax.step": float("inf")}}, b"", "__metadata__ does not parse"),
    ({"__metadata__": {"gt_jax.config": "[" * 100_000}}, b"", "__metadata__ does not parse .it is nested too deeply"),
    ({"a": entry([1], 0, 4, [])}, b"0000", r"a has dtype \[\]; known are"), (b"[" * 100_000, b"", "nested too deeply"),
])  # fmt: skip
def test_damaged_files(tmp_path, header, data, words):
    with pytest.raises(Unreadable, match=words):
        SafetensorsFile(write(tmp_path / "a.safetensors", header, data))


def test_truncated_headers(tmp_path):
    for length, words in ((400, "its header has 400 bytes"), (2**60, "its header would have")):
        with pytest.raises(Unreadable, match=words):
            SafetensorsFile(write(tmp_path / "a.safetensors", {}, length=length))
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(Unreadable, match="0 bytes"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    data = b"x" + np.arange(3, dtype=np.float32).tobytes()
    path = write(tmp_path / "a.safetensors", {"u": entry([1], 0, 1, "U8"), "f": entry([3], 1, 13)}, data)
    np.testing.assert_array_equal(SafetensorsFile(path).read("f"), [0, 1, 2])


def test_a_tensor_is_summed_where_there_is_a_sum_to_compare_with(tmp_path, monkeypatch):
    summed = []
    monkeypatch.setattr(safetensors, "checksum", lambda value: summed.append(value) or checksum(value))
    foreign = SafetensorsFile(write(tmp_path / "a.safetensors", {"f": entry([3], 0, 12)}, bytes(12)))
    assert not foreign.has_checksums and not foreign.read("f").any() and foreign.damaged() == [] and not summed
    own = SafetensorsFile(origin.write(tmp_path / "b.safetensors", {"f": np.ones(3, np.float32)}))
    summed.clear()
    assert own.read("f").all() and len(summed) == 1


def test_a_changed_bit_anywhere_in_a_file_of_ours_is_found(tmp_path):
    """In the config, the lineage and a name too, where it leaves JSON as good as before."""
    path, values = tmp_path / "a.safetensors", {"w": np.arange(3, dtype=np.float32), "u": np.zeros((), np.float32)}
    infos = {name: Info(value.shape, value.dtype) for name, value in values.items()}
    with Writer(path, infos, {"k_max": 4}, 12, [{"kind": "train", "step": 12}]) as writer:
        for name, value in values.items():
            writer.put(name, value)
    whole = path.read_bytes()
    assert SafetensorsFile(path).damaged() == []
    own = whole.index(b"gt_jax.header_crc32")  # without its name there is nothing to compare, and nothing else is wrong
    for bit in range(8 * len(whole)):
        if own <= bit // 8 < own + len("gt_jax.header_crc32"):
            continue
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with contextlib.suppress(Unreadable):
            assert SafetensorsFile(path).damaged(), bit


@pytest.mark.parametrize("dtype", [np.bool_, np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex128])
def test_turned_arrays_are_copied_as_they_are(dtype):
    for shape in ((130, 66), (3, 5, 7), (9, 1), (1, 9), (4, 200)):
        value = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
        flat = value.reshape(shape[0], -1)
        joined = flat.T.reshape(*flat.shape[1:], shape[0], 1)
        for one in (value, value.T, flat.T, joined, flat[:, ::2].T, value[::-1].T):
            made = in_order(one)
            assert made.flags.c_contiguous and (made.shape, made.dtype) == (one.shape, one.dtype)
            assert made.tobytes() == one.tobytes()


def test_a_mapped_array_is_let_go_and_still_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "CHUNK", 2**14)
    value = np.random.default_rng(0).integers(0, 2**16, (300, 200), np.uint16)
    with Writer(tmp_path / "x.safetensors", {"x": Info(value.shape, value.dtype)}) as writer:
        writer.put("x", value)
    mapped = SafetensorsFile(tmp_path / "x.safetensors").read("x")
    assert checksum(mapped) == zlib.crc32(value.tobytes()) and np.array_equal(mapped, value)
    assert np.array_equal(in_order(mapped.T), value.T) and same_bytes(mapped.T, value.T)
    private = np.memmap(tmp_path / "x.safetensors", np.uint8, "c")
    private[-1] ^= 255
    before = private[-1]
    let_go(private)  # of a copy of its own nothing may be lost
    assert private[-1] == before
