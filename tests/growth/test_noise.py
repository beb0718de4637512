"""The noise by position against numpy's own generator, and the scan for values that are not finite."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gt_jax.growth import noise, noise_on_devices, slices_on_host
from gt_jax.growth.finite_check import first_not_finite
from gt_jax.growth.transform import Leaf, Part, grow_block, grow_slice


@pytest.fixture(scope="module")
def bits():
    return jax.jit(noise_on_devices.random_bits)


def numpys(key, block):
    """The 256 bits of a block, straight from the generator: eight positions."""
    philox = np.random.Philox(key=key, counter=block)
    return philox.random_raw(4).astype("<u8").view("<u4")


@pytest.mark.parametrize("start", [0, 5, 2**31 - 30, 2**32 - 64])
def test_devices_make_the_bits_of_numpys_generator_at_any_position(bits, start):
    rng = np.random.default_rng(start)
    for key in (*rng.integers(0, 2**64 - 1, (4, 2), np.uint64, endpoint=True), np.uint64([0, 2**64 - 1])):
        where = np.arange(start, start + 64)
        want = [numpys(key, position // 8)[position % 8] for position in where]
        np.testing.assert_array_equal(noise.random_bits(key, start, 64), want)
        np.testing.assert_array_equal(bits(noise_on_devices.limbs(key), where.astype(np.uint32)), want)


def test_bits_do_not_depend_on_where_a_piece_begins():
    key = noise.key_of(2**32 - 1, "mixer/query/w", 70)
    whole = noise.random_bits(key, 0, 100)
    for start, stop in ((0, 1), (1, 2), (3, 100), (7, 9), (8, 16), (99, 100)):
        np.testing.assert_array_equal(noise.random_bits(key, start, stop - start), whole[start:stop])
    long = noise.at(key, 3, noise.PIECE + 50, noise.step(1e-4))
    np.testing.assert_array_equal(long[-60:], noise.at(key, noise.PIECE - 7, 60, noise.step(1e-4)))


@pytest.mark.parametrize(("source", "dtype"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16",) * 2])
def test_numpy_and_a_compiled_program_grow_the_same_bytes(source, dtype):
    dtype, source = (np.dtype(getattr(ml_dtypes, name, name)) for name in (dtype, source))
    values = (np.random.default_rng(0).normal(size=5000) * 0.02).astype(source)
    part = Part("params/segment0/layer0/mlp/up/w", 0, 0.6180339, 3)
    leaf = Leaf(part.source, "scaled", (part,), (1, 5013), dtype, (1, 5013))
    for carry, std in (("weights", 1e-4), ("weights", 0.0), ("gain", 0.0)):
        options = {"carry": carry, "noise_std": std, "seed": 11}
        got, want = (grow(leaf, 0, values, 13, **options) for grow in (slices_on_host.grow_slice, grow_slice))
        assert got.dtype == want.dtype == dtype
        np.testing.assert_array_equal(got.view(np.uint8), np.asarray(want).view(np.uint8))


@pytest.mark.parametrize("shape", [(), (63,), (4, 16), (5, 13), (2**16 + 3,)], ids=str)
def test_a_block_that_is_filled_up_for_its_program_keeps_its_bytes(shape):
    values = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    part = Part("params/segment0/layer0/mlp/down/w", 0, 0.35, 2)
    leaf = Leaf(part.source, "output", (part,), (1, *shape), np.dtype("float32"), (1, *shape))
    for carry in ("output", "gain"):  # scaled, and noise alone
        options = {"carry": carry, "noise_std": 1e-2, "seed": 5}
        want = slices_on_host.grow_slice(leaf, 0, values.reshape(-1), 0, **options)
        got = np.asarray(grow_block(leaf, 0, values, **options))
        assert got.shape == shape and not np.array_equal(got, values)
        np.testing.assert_array_equal(got.reshape(-1), want)


def test_positions_are_row_major():
    shape = (3, 4, 5)
    found = noise_on_devices.positions(shape, jax.typeof(jnp.zeros(shape)).sharding)
    np.testing.assert_array_equal(found, np.arange(60).reshape(shape))


def test_the_noise_is_exact_in_float32():
    """An integer of 10 bits times a step of 14 bits: the float32 product is the exact one."""
    key, step = noise.key_of(3, "mixer/query/w", 5), noise.step(1e-4)
    found = noise.at(key, 0, 2**13, step)
    whole = found.astype(np.float64) / float(step)
    np.testing.assert_array_equal(whole, np.round(whole))
    np.testing.assert_allclose(found.std(), 1e-4, rtol=0.03)
    assert np.abs(whole).max() <= 510 and float(step) * 2**100 == int(float(step) * 2**100)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "float8_e5m2"])
def test_the_first_value_that_is_not_finite_is_found(dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = np.linspace(-1, 1, 100_000).astype(dtype)
    values[:4] = np.asarray([ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min, 0, -0.0]).astype(dtype)
    assert first_not_finite(values) is None
    for place, wrong in ((99_999, np.nan), (70_001, -np.inf), (65_536, np.inf), (5, -np.nan)):
        values[place] = wrong
        assert first_not_finite(values) == place


def test_integers_are_finite():
    assert first_not_finite(np.full(10, -1, np.int32)) is None and first_not_finite(np.ones(3, np.bool_)) is None
