"""Causal attention in tiles and by the splash kernels against the dense definition: values, gradients, memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_attention import xla
from pallas_kernels.causal_attention.api import IMPLEMENTATIONS, TILED_FROM, _best, causal_attention
from pallas_kernels.positions import Positions

SMALL_TILES = functools.partial(xla.causal_attention, query_tile=8, key_tile=16)


def arguments(tokens, heads, kv_heads, width, keys=None):
    random, keys = np.random.default_rng(0), tokens if keys is None else keys
    shapes = (2, tokens, heads, width), (2, keys, kv_heads, width), (2, keys, kv_heads, width)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


def two_rows(tokens):
    """Three documents and padding in one row, two documents in the other; positions with gaps."""
    cuts = [tokens // 3, tokens // 2, tokens - 5]
    first = np.searchsorted(cuts, np.arange(tokens), side="right") + 1
    first[first == 4] = 0
    segments = jnp.asarray(np.stack([first, (np.arange(tokens) > 2) + 1]), jnp.int32)
    places = jnp.asarray(np.stack([np.arange(tokens), np.arange(tokens) * 2]), jnp.int32)
    return Positions(places, segments, places, segments)


def value_and_gradients(function, *tensors):
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(tensors[0].shape), jnp.float32)
    run = jax.value_and_grad(lambda *x: (jnp.sum((o := function(*x)) * weight), o), (0, 1, 2), has_aux=True)
    (_, o), gradients = jax.jit(run)(*tensors)
    return o, gradients


@pytest.mark.parametrize("together", [False, True], ids=["row by row", "all rows"])
@pytest.mark.parametrize("window", [None, 11])
def test_tiles_are_the_dense_definition(window, together):
    where, tensors = two_rows(43), arguments(43, 4, 2, 8)
    tiled = functools.partial(SMALL_TILES, together=together)
    got, wanted = (value_and_gradients(lambda q, k, v, f=f: f(q, k, v, where, window), *tensors)
                   for f in (tiled, IMPLEMENTATIONS["reference"]))  # fmt: skip
    chex.assert_trees_all_close(got, wanted, atol=1e-5)


def test_tokens_of_no_segment_read_zeros_from_the_splash_kernels_too():
    segments = jnp.asarray([[1, 1, -1, -1]] * 2, jnp.int32)
    places = jnp.tile(jnp.arange(4)[None], (2, 1))
    where, tensors = Positions(places, segments, places, segments), arguments(4, 1, 1, 128)
    got, wanted = (value_and_gradients(lambda q, k, v, name=name: causal_attention(
        q, k, v, where, same_tokens=True, implementation=name), *tensors)
        for name in ("pallas_tpu_interpreted", "reference"))  # fmt: skip
    chex.assert_trees_all_close(got, wanted, atol=1e-5)
    assert np.all(np.asarray(got[0][:, 2:]) == 0) and all(np.all(np.asarray(g[:, 2:]) == 0) for g in got[1][1:])


@pytest.mark.slow
def test_the_splash_kernels_are_the_dense_definition():
    where, tensors = two_rows(140), arguments(140, 2, 1, 128)
    got, wanted = (value_and_gradients(lambda q, k, v, name=name: causal_attention(
        q, k, v, where, same_tokens=True, implementation=name), *tensors)
        for name in ("pallas_tpu_interpreted", "reference"))  # fmt: skip
    chex.assert_trees_all_close(got, wanted, atol=1e-5)


def test_a_query_without_keys_reads_zeros():
    """As padding does whose keys come from a cache; keys of segment -1 are nobody's, also not of a query of theirs."""
    q, k, v = arguments(3, 2, 1, 8, keys=20)
    segments = jnp.where(jnp.arange(20)[None] < 9, 1, -1) * jnp.ones((2, 1), jnp.int32)
    where = Positions(jnp.tile(jnp.asarray([[7, 8, 9]]), (2, 1)), jnp.tile(jnp.asarray([[1, 0, -1]]), (2, 1)),
                      jnp.tile(jnp.arange(20)[None], (2, 1)), segments)  # fmt: skip
    for name in ("reference", "xla"):
        o = causal_attention(q, k, v, where, implementation=name)
        assert np.all(np.asarray(o[:, 1:]) == 0) and np.all(np.abs(o[:, 0]).max(-1) > 0)


def test_tiles_need_no_array_of_queries_by_keys():
    def temporaries(tokens):
        shapes = [jax.ShapeDtypeStruct((1, tokens, n, 8), jnp.float32) for n in (2, 1, 1)]
        places = Positions(*[jax.ShapeDtypeStruct((1, tokens), jnp.int32)] * 4)
        total = lambda q, k, v, where: xla.causal_attention(q, k, v, where, None).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes, places).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(2048), temporaries(8192)
    assert long < 5 * short and long < 8192**2


def test_the_choice_follows_the_shape(monkeypatch):
    def best(tokens, keys, window=None, same=True):
        q, k = (jnp.zeros((1, n, 1, 64), jnp.bfloat16) for n in (tokens, keys))
        return _best(q, k, window, same)

    assert best(TILED_FROM, TILED_FROM) == "xla" and best(TILED_FROM - 1, TILED_FROM) == "reference"
    assert best(1, 2**19, same=False) == "reference"  # decoding
    monkeypatch.setattr("pallas_kernels.causal_attention.api.target_device", lambda: ("tpu", "TPU v5"))
    assert best(TILED_FROM, TILED_FROM) == "pallas_tpu"
    assert best(TILED_FROM, TILED_FROM, same=False) == best(TILED_FROM, TILED_FROM, window=9) == "xla"


def test_what_does_not_fit_is_said_at_once():
    q, k, v = arguments(4, 3, 2, 8)
    with pytest.raises(ValueError, match=r"(?s)needs a TPU.*window 0.*positions.key .*3 heads.*no window of positions"):
        causal_attention(q, k, v, two_rows(8)._replace(query=jnp.zeros((2, 4))), 0, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="'fast' is not one of reference, xla, cudnn, pallas_tpu"):
        causal_attention(q, k, v, two_rows(4), implementation="fast")
