"""Embeddings: the Kronecker code against the code written out, bytes cut at characters, no large tensor anywhere."""

from __future__ import annotations

import functools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.model import EmbeddingConfig
from gt_jax.devices.pods import hlo
from gt_jax.devices.pods.collectives import Links
from gt_jax.devices.sharding import Rules, make_mesh, put_like, reshard, with_mesh_devices
from gt_jax.models.layers.embedding import Embedding, Kronecker, byte_rows
from gt_jax.models.layers.primitives import WeightSpec
from gt_jax.models.layers.table_rows import table_rows
from gt_jax.text.token_bytes import default_texts, token_table
from tests.support import random_tree

VOCAB, WIDTH, POSITIONS, EPSILON = 300, 16, 8, 1e-6
TEXTS = [b"", b"a", b"b", b"ab", b"ba", b"aa", "é€".encode(), b"\x00", b"\x00\x00", b"longer than eight", b"longer t"]
TOKENS = jnp.asarray([[3, 4, 0, 9, 1, 7], [6, 8, 2, 5, 3, 1]], jnp.int32)


def embedding(kind: str, dtype: str = "float32") -> Embedding:
    return Embedding(EmbeddingConfig(kind, POSITIONS), VOCAB, WIDTH, Rules(), WeightSpec("float32", dtype), EPSILON)


@functools.cache
def variables(kind: str):
    """Random parameters; the tokens' texts are `TEXTS`, then the default ones."""
    moved = jax.jit(lambda key: {"params": random_tree(embedding(kind).init(key, TOKENS)["params"], 1)})(
        jax.random.key(0))
    if kind != "table":
        table, length = token_table(TEXTS + default_texts(VOCAB)[len(TEXTS):], POSITIONS)
        moved["statistics"] = {"token_bytes": jnp.asarray(table), "token_length": jnp.asarray(length)}
    return moved


def code(text: bytes, positions: int = POSITIONS) -> np.ndarray:
    """The standardised flat code of a token, written out: [256 * positions] float64."""
    m = np.zeros((256, positions))
    for position, byte in enumerate(text[:positions]):
        m[byte, position] = 1 / np.sqrt(len(text[:positions]))
    flat = m.reshape(-1)
    return (flat - flat.mean()) / (flat.std(ddof=1) + 1e-6)


def by_hand(kind: str, p, tokens: np.ndarray) -> np.ndarray:
    out = np.zeros((*tokens.shape, WIDTH))
    texts = TEXTS + default_texts(VOCAB)[len(TEXTS):]
    for place, token in np.ndenumerate(tokens):
        if kind != "kronecker":
            out[place] += p["table"][token]
        if kind != "table":
            y = code(texts[token]) @ p["kronecker"]["w"].reshape(-1, WIDTH)
            out[place] += y / np.sqrt((y**2).mean() + EPSILON) * p["norm"]["scale"]
    return out


@pytest.mark.parametrize("kind", ["table", "kronecker", "kronecker+table"])
def test_float64_agrees_with_the_code_written_out(kind):
    with jax.enable_x64(True):
        widen = lambda a: jnp.asarray(np.asarray(a), jnp.float64)  # noqa: E731
        wide = {**variables(kind), "params": jax.tree.map(widen, variables(kind)["params"])}
        got = jax.jit(embedding(kind, "float64").apply)(wide, TOKENS)
        assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, by_hand(kind, jax.tree.map(np.asarray, wide["params"]), np.asarray(TOKENS)),
                               atol=1e-10)


def test_every_token_has_a_row_of_its_own():
    v = dict(variables("kronecker"))
    table, length = token_table(default_texts(VOCAB), POSITIONS)
    v["statistics"] = {"token_bytes": jnp.asarray(table), "token_length": jnp.asarray(length)}
    rows = np.asarray(jax.jit(embedding("kronecker").apply)(v, jnp.arange(VOCAB, dtype=jnp.int32)[None]))[0]
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1) + 10 * np.eye(VOCAB)
    assert distances.min() > 0.1


def test_the_gradient_is_that_of_the_dense_projection():
    """w as a matrix [256 * positions, d] times the codes written out, both differentiated."""
    w = variables("kronecker")["params"]["kronecker"]["w"]
    weight = jax.random.normal(jax.random.key(3), (*TOKENS.shape, WIDTH))
    dense = jnp.asarray(np.stack([code(TEXTS[i]) for i in np.asarray(TOKENS).ravel()]).reshape(*TOKENS.shape, -1),
                        jnp.float32)
    table, length = (jnp.asarray(a)[TOKENS] for a in token_table(TEXTS, POSITIONS))
    module = Kronecker(POSITIONS, WIDTH, Rules(), WeightSpec())

    def sparse(w):
        return jnp.sum(jnp.sin(module.apply({"params": {"w": w}}, table, length) / 90) * weight)

    def full(w):
        return jnp.sum(jnp.sin(dense @ w.reshape(-1, WIDTH) / 90) * weight)

    got, wanted = jax.jit(jax.value_and_grad(sparse))(w), jax.jit(jax.value_and_grad(full))(w)
    assert float(jnp.abs(wanted[1]).max()) > 0.1
    chex.assert_trees_all_close(got, wanted, rtol=2e-4, atol=2e-5)


def test_neither_pass_holds_a_row_for_every_byte():
    """At 32 positions the temporaries stay below a quarter of one [b, t, 32, d]; a [b, t, 8192] is larger still."""
    b, t, d = 2, 256, 128
    shapes = ((256, 32, d), (b, t, 32), (b, t), (b, t, d))
    dtypes = (jnp.float32, jnp.uint8, jnp.int32, jnp.float32)
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def loss(w, text, length, weight):
        return jnp.sum(jnp.tanh(byte_rows(w, text, length)) * weight)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(*given).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < b * t * 32 * d * 4 / 4


def test_frequent_bytes_are_summed_in_float32():
    """1024 gradients of 1 into one bfloat16 row: bfloat16 sums would stop at 256."""
    w = jnp.zeros((256, 1, 2), jnp.bfloat16)
    text, length = jnp.full((1, 1024, 1), 7, jnp.uint8), jnp.ones((1, 1024), jnp.int32)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(byte_rows(w, text, length))))(w)
    np.testing.assert_array_equal(gradient[7].astype(jnp.float32), 1024)
    table = jax.jit(jax.grad(lambda p: jnp.sum(embedding("table", "bfloat16").apply(
        {"params": p}, jnp.full((1, 1024), 7, jnp.int32)).astype(jnp.float32))))(variables("table")["params"])
    np.testing.assert_array_equal(table["table"][7], 1024)
    stored = jnp.zeros((8, 2), jnp.bfloat16)  # and where the table itself is bfloat16
    frequent = jax.jit(jax.grad(lambda t: jnp.sum(table_rows(t, jnp.full((1, 1024), 7, jnp.int32), Rules()))))(stored)
    np.testing.assert_array_equal(frequent[7].astype(jnp.float32), 1024)


def test_starts_with_the_default_texts_and_the_contract_s_shapes():
    fresh = jax.eval_shape(embedding("kronecker+table").init, jax.random.key(0), TOKENS)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype.name), dict(fresh))
    assert shapes == {
        "params": {
            "table": ((VOCAB, WIDTH), "float32"), "kronecker": {"w": ((256, POSITIONS, WIDTH), "float32")},
            "norm": {"scale": ((WIDTH,), "float32")},
        },
        "statistics": {"token_bytes": ((VOCAB, POSITIONS), "uint8"), "token_length": ((VOCAB,), "int32")},
    }  # fmt: skip
    start = jax.jit(embedding("kronecker").init)(jax.random.key(0), TOKENS)["statistics"]
    row = np.asarray(start["token_bytes"][299])[: int(start["token_length"][299])]
    assert row.tobytes() == b"<299>" and int(start["token_bytes"][200, 0]) == 200


def test_bfloat16_stays_near_float32():
    exact = jax.jit(embedding("kronecker+table").apply)(variables("kronecker+table"), TOKENS)
    low = jax.jit(embedding("kronecker+table", "bfloat16").apply)(variables("kronecker+table"), TOKENS)
    assert low.dtype == jnp.bfloat16
    assert float(jnp.sqrt(jnp.mean((low.astype(jnp.float32) - exact) ** 2) / jnp.mean(exact**2))) < 0.01


def test_a_mesh_gives_the_same_values_and_gradients():
    kind, tokens = "kronecker+table", jnp.arange(48, dtype=jnp.int32).reshape(8, 6) % len(TEXTS)

    def step(params, statistics):
        placed = reshard(tokens, Rules().spec("batch", None))
        out = embedding(kind).apply({"params": params, "statistics": statistics}, placed)
        return jnp.sum(jnp.sin(out))

    v, rows = variables(kind), Rules().spec("batch", None)
    graded = jax.jit(jax.value_and_grad(step))
    wanted = jax.device_get(graded(v["params"], v["statistics"]))
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        shapes = jax.eval_shape(lambda: embedding(kind).init(jax.random.key(0), reshard(tokens, rows)))
        placed = put_like(v, jax.tree.map(with_mesh_devices, dict(shapes)))
        value, gradient = jax.jit(jax.value_and_grad(step))(placed["params"], placed["statistics"])
        assert gradient["kronecker"]["w"].sharding.spec == Rules().spec(None, None, "embed")
        assert gradient["table"].sharding.spec == Rules().spec(None, "embed")
    chex.assert_trees_all_close(jax.device_get((value, gradient)), wanted, rtol=1e-4, atol=1e-5)


def test_texts_are_cut_between_characters_and_invalid_ones_plainly():
    euro = "€".encode()  # three bytes
    texts = [euro * 3, b"ab" + euro * 3, b"\xff" + euro * 3, "😀".encode() * 3, b"123456789", b"", "€€ab".encode()]
    table, length = token_table(texts, 8)
    assert [row[:n].tobytes() for row, n in zip(table, length, strict=True)] == [
        euro * 2, b"ab" + euro * 2, b"\xff" + euro * 2 + euro[:1], "😀".encode() * 2, b"12345678", b"", "€€ab".encode(),
    ]  # fmt: skip
    assert table.dtype == np.uint8 and length.dtype == np.int32
    assert not any(row[n:].any() for row, n in zip(table, length, strict=True))


def test_the_default_texts_of_a_large_vocabulary_differ_and_are_quick():
    began = time.process_time()
    texts = default_texts(131072)
    table, length = token_table(texts)
    assert time.process_time() - began < 1
    assert len(set(texts)) == 131072 and table.shape == (131072, 32) and length.max() == 8
    assert table[131071, :8].tobytes() == b"<131071>" and length[0] == 1 and table[0, 0] == 0


@pytest.mark.parametrize(("vocab", "moved"), [(300, "tokens"), (20, "table")])
def test_the_fewer_of_tokens_and_table_are_moved_to_the_other(vocab, moved):
    """The values to the bit, a gradient added up in float32, and no device that receives what is larger."""
    random, width = np.random.default_rng(0), 16
    tokens = jnp.asarray(random.integers(0, vocab, (8, 24)), jnp.int32)
    table = jnp.asarray(random.standard_normal((vocab, width)), jnp.bfloat16)
    shares = random.standard_normal((8, 24, width)).astype("float32")

    def weighed(table, tokens, shares):
        rows = table_rows(table, tokens, Rules())
        return jnp.sum(rows * shares), rows

    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        placed = (reshard(table, Rules().spec(None, "embed")), reshard(tokens, Rules().spec("batch", None)),
                  reshard(jnp.asarray(shares), Rules().spec("batch", None, None)))
        compiled = jax.jit(jax.grad(weighed, has_aux=True)).lower(*placed).compile()
        gradient, rows = compiled(*placed)
    assert gradient.sharding.spec == Rules().spec(None, "embed") and gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(rows, np.float32), np.asarray(table, np.float32)[tokens])
    wanted = np.zeros((vocab, width))
    np.add.at(wanted, np.asarray(tokens), np.asarray(jnp.asarray(shares, jnp.bfloat16), np.float64))
    np.testing.assert_allclose(np.asarray(gradient, np.float64), wanted, rtol=2**-8, atol=1e-6)
    sent = [one for all_of_it in Links(hlo.read(compiled.as_text())).sent.values() for one in all_of_it]
    assert any(one.kind == "all-to-all" for one in sent) == (moved == "tokens"), sent
    largest = {"tokens": 2 * vocab * width, "table": 8 * vocab * width}[moved]  # a quarter of it in float32, or half
    assert all(one.bytes <= largest for one in sent), sent
