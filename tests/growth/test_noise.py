"""The noise by position against the library's own generator, and the scan for values that are not finite."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gt_jax.growth import noise
from gt_jax.growth.finite_check import first_not_finite


@pytest.fixture(scope="module")
def bits():
    return jax.jit(noise.random_bits)


def test_bits_are_the_librarys_at_any_position(bits):
    """`jax.random.bits` draws a whole block; ours any part of it, with positions up to 2^32."""
    key = jax.random.key(7, impl="threefry2x32")
    with jax.threefry_partitionable(True):
        whole = jax.random.bits(key, (4096,), jnp.uint32)
    data = jax.random.key_data(key)
    np.testing.assert_array_equal(bits(data, jnp.arange(4096, dtype=jnp.uint32)), whole)
    far = np.arange(2**32 - 4096, 2**32, dtype=np.uint32)
    last = bits(data, jnp.asarray(far))[-3:]
    np.testing.assert_array_equal(last, [threefry(data, int(position)) for position in far[-3:]])


def threefry(key, position):
    """Threefry-2x32 in Python's integers, from the paper's definition; both words xored."""
    k = [int(key[0]), int(key[1])]
    k.append(k[0] ^ k[1] ^ 0x1BD11BDA)
    a, b = k[0], (position + k[1]) % 2**32
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    for turn in range(20):
        a = (a + b) % 2**32
        r = rotations[turn % 8]
        b = ((b << r) | (b >> (32 - r))) % 2**32 ^ a
        if turn % 4 == 3:
            block = turn // 4 + 1
            a, b = (a + k[block % 3]) % 2**32, (b + k[(block + 1) % 3] + block) % 2**32
    return a ^ b


def test_positions_are_row_major():
    shape = (3, 4, 5)
    found = noise.positions(shape, jax.typeof(jnp.zeros(shape)).sharding)
    np.testing.assert_array_equal(found, np.arange(60).reshape(shape))


def test_the_noise_is_exact_in_float32():
    """An integer of 10 bits times a step of 14 bits: the float32 product is the exact one."""
    key, step = noise.key_data(3, "mixer/query/w", 5), noise.step(1e-4)
    found = np.asarray(noise.at(key, jnp.arange(2**13, dtype=jnp.uint32), step))
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
