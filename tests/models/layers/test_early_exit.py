"""Depth-wise ACT in a stack: halted tokens as if deleted, decoding, meshes, and time that really falls."""

from __future__ import annotations

import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.devices.sharding import Rules, make_mesh, on_mesh, reshard
from gt_jax.models.layers.compaction import bucket_lengths, compact, move_tokens, run_compacted
from gt_jax.models.layers.early_exit import ExitHead, alive_share, exit_step, keep_where, ponder, start
from tests.support import assert_rounded_alike, drawn, segments

RULES, WIDTH, LAYERS, THRESHOLD = Rules(), 8, 5, 0.9
IDS = jnp.concatenate(
    [segments(12), segments(3, 7, 2), jnp.concatenate([segments(4, 5), jnp.zeros((1, 3), jnp.int32)], 1)]
)
TOKENS = IDS.shape[1]


class Toy(nn.Module):
    """Delta(x)_t = tanh(W mean-free running sum of the document up to t) + sin(position): causal, order-dependent."""

    rules: Rules

    @nn.compact
    def __call__(self, x, segment_ids, positions, cache):
        rows = on_mesh(self.rules.spec("batch", None))
        w = self.param(
            "w", nn.initializers.normal(0.5), (WIDTH, WIDTH), jnp.float32, on_mesh(self.rules.spec(None, None))
        )
        cache_in = cache or {"total": jnp.zeros_like(x[:, 0]), "segment": jnp.full_like(segment_ids[:, 0], -1)}
        total = reshard(cache_in["total"], self.rules.spec("batch", None))
        segment = reshard(cache_in["segment"], self.rules.spec("batch"))

        def step(carry, xs):
            total, segment = carry
            value, own = xs
            total = 0.8 * jnp.where((own == segment)[:, None], total, 0.0) + value
            return (total, own), jnp.einsum("bd,df->bf", total, w, out_sharding=rows)

        (total, segment), mixed = jax.lax.scan(step, (total, segment), (jnp.moveaxis(x, 1, 0), segment_ids.T))
        delta = jnp.tanh(jnp.moveaxis(mixed, 0, 1)) + jnp.sin(positions.astype(x.dtype))[..., None]
        new = None if cache is None else {"total": total, "segment": segment}
        return delta, {"size": jnp.sum(jnp.abs(delta) * (segment_ids > 0)[..., None])}, new


class Block(nn.Module):
    rules: Rules
    buckets: tuple[int, ...] | None

    @nn.compact
    def __call__(self, state, weights, segment_ids, positions, xs):
        last, cache = xs
        share = alive_share(state, (segment_ids > 0).astype(jnp.float32))
        layer = Toy(self.rules, name="layer0")
        state, extras, cache = exit_step(
            layer, lambda layer, *operands: layer(*operands), state, segment_ids, positions, cache,
            weights=weights, threshold=THRESHOLD, last=last, rules=self.rules, buckets=self.buckets,
        )  # fmt: skip
        return state, ((share, extras), cache)


class Stack(nn.Module):
    rules: Rules = RULES
    buckets: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x, segment_ids, positions, cache=None):
        weights = ExitHead(WIDTH, self.rules, 0.0, name="exit").weights()
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0), length=LAYERS,
        )  # fmt: skip
        last = jnp.arange(LAYERS) == LAYERS - 1
        scanned = blocks(self.rules, self.buckets, name="segment0")
        return scanned(start(x, segment_ids), weights, segment_ids, positions, (last, cache))


def inputs(ids=IDS, seed: int = 3):
    x = jax.random.normal(jax.random.key(seed), (*ids.shape, WIDTH), jnp.float32)
    return x, ids, jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)


@functools.cache
def parameters():
    shapes = jax.eval_shape(Stack().init, jax.random.key(0), *inputs())
    params = drawn(shapes["params"], 0.4, seed=2)
    params["exit"]["output"]["w"] *= 5  # p spread, so that tokens leave at every layer
    params["exit"]["output"]["b"] = jnp.full((1,), -0.5)
    return params


@functools.cache
def run(buckets: tuple[int, ...] | None = None):
    return jax.jit(lambda params, *args: Stack(buckets=buckets).apply({"params": params}, *args))


def train(params, args, buckets):
    """Gradient of a loss of output and ponder cost, with the final state and the extras of each layer."""

    def loss(params):
        state, ((_, extras), _) = Stack(buckets=buckets).apply({"params": params}, *args)
        real = (args[1] > 0).astype(jnp.float32)
        return jnp.sum(jnp.sin(state.output)) + ponder(state, real), (state, extras["size"])

    return jax.grad(loss, has_aux=True)(params)


def by_hand(params, x, ids):
    """Every row a list of the tokens that are left, each layer a loop over that list; float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, output = np.asarray(x, np.float64).copy(), np.zeros(x.shape)
    used, remainder, halted = np.zeros(ids.shape), np.zeros(ids.shape), np.zeros(ids.shape)
    weights = np.zeros((LAYERS, *ids.shape))
    for row in range(ids.shape[0]):
        left = [t for t in range(ids.shape[1]) if ids[row, t] > 0]
        for layer in range(LAYERS):
            total, before, stay = np.zeros(WIDTH), None, []
            for t in left:
                total = (0.8 * total if before == ids[row, t] else 0.0) + x[row, t]
                before = ids[row, t]
                x[row, t] = x[row, t] + np.tanh(total @ p["segment0"]["layer0"]["w"][layer]) + np.sin(t)
                inner = x[row, t] @ p["exit"]["hidden"]["w"] + p["exit"]["hidden"]["b"]
                inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
                chance = 1 / (1 + np.exp(-(inner @ p["exit"]["output"]["w"] + p["exit"]["output"]["b"])[0]))
                used[row, t] += 1
                if halted[row, t] + chance >= THRESHOLD or layer == LAYERS - 1:
                    weights[layer, row, t] = remainder[row, t] = 1 - halted[row, t]
                else:
                    weights[layer, row, t] = chance
                    halted[row, t] += chance
                    stay.append(t)
                output[row, t] += weights[layer, row, t] * x[row, t]
            left = stay
    return x, output, used, remainder, weights


# Skipping


def test_compact_is_stable_and_moves_back():
    living = jax.random.bernoulli(jax.random.key(0), 0.4, IDS.shape).at[1].set(False)
    packing = compact(living, RULES)
    for row in range(3):
        there = np.flatnonzero(living[row])
        np.testing.assert_array_equal(packing.order[row, : len(there)], there)
        np.testing.assert_array_equal(np.sort(packing.order[row]), np.arange(TOKENS))
    np.testing.assert_array_equal(jnp.take_along_axis(packing.order, packing.place, axis=1), inputs()[2])
    x = inputs()[0]
    back = move_tokens(move_tokens(x, packing.order, packing.place, RULES), packing.place, packing.order, RULES)
    np.testing.assert_array_equal(back, x)


def test_equals_the_stack_with_halted_tokens_deleted():
    with jax.enable_x64():
        x, ids, positions = inputs()
        x = x.astype(jnp.float64)
        state, ((shares, _), _) = run()(parameters(), x, ids, positions)
        wanted_x, output, used, remainder, weights = by_hand(parameters(), x, np.asarray(ids))
        real = np.asarray(ids) > 0
        assert set(used[real]) == set(range(1, LAYERS + 1)), "tokens should leave at every layer, or the test is weak"
        np.testing.assert_allclose(weights.sum(0)[real], 1.0, atol=1e-12)
        np.testing.assert_array_equal(np.asarray(state.layers), used)
        for got, wanted in ((state.x, wanted_x), (state.output, output)):
            np.testing.assert_allclose(got[real], wanted[real], atol=1e-10)
        np.testing.assert_allclose(state.remainder, remainder, atol=1e-10)
        entering = [(used > layer)[real].mean() for layer in range(LAYERS)]
        np.testing.assert_allclose(shares, entering, atol=1e-6)
        np.testing.assert_allclose(shares.sum(), used[real].mean(), atol=1e-5)


def test_a_halted_token_changes_nothing_in_deeper_layers():
    """Its stream is replaced after it left; only its own place may notice."""
    x, ids, positions = inputs()
    living = (ids > 0).at[0, 4].set(False)
    params = jax.tree.map(lambda leaf: leaf[0], parameters()["segment0"]["layer0"])

    @jax.jit
    def update(x):
        def delta(layer, x, ids, positions):
            return layer(x, ids, positions, None)[:2]

        def call(layer, *args):
            return run_compacted(layer, delta, *args, living, rules=RULES)

        return nn.apply(call, Toy(RULES))({"params": params}, x, ids, positions)[0]

    np.testing.assert_array_equal(update(x), update(x.at[0, 4].set(7.0)))
    assert not update(x)[0, 4].any()
    reach = jax.jit(jax.grad(lambda x: jnp.sum(update(x) ** 2)))(x)
    assert not reach[0, 4].any() and reach[0, 3].any()


def test_buckets_change_what_is_computed_and_nothing_else():
    """Decisions are the same, values as near as two programs of one equation are: fewer rows round in another way."""
    buckets = bucket_lengths(TOKENS)
    assert buckets == (0, 2, 3, 6, 12) and bucket_lengths(1) == (0, 1) and bucket_lengths(9) == (0, 2, 3, 5, 9)
    compiled = jax.jit(train, static_argnums=2)
    full, cut = compiled(parameters(), inputs(), None), compiled(parameters(), inputs(), buckets)
    fullest = [int((full[1][0].layers > layer).sum(1).max()) for layer in range(LAYERS)]
    assert fullest[0] == TOKENS and fullest[-1] <= 6, "a shorter bucket should run, or the test is empty"
    np.testing.assert_array_equal(full[1][0].layers, cut[1][0].layers)
    assert_rounded_alike(cut[1], full[1], terms=WIDTH, chain=LAYERS)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in flatten(full[0]).values())
    assert_rounded_alike(cut[0], full[0], terms=2 * TOKENS, chain=2 * LAYERS)


def test_a_skipped_layer_gives_zeros_and_wrong_buckets_are_refused():
    x, ids, positions = inputs()
    layer, params = Toy(RULES), jax.tree.map(lambda leaf: leaf[0], parameters()["segment0"]["layer0"])

    def call(layer, living, buckets):
        delta = lambda layer, *args: layer(*args, None)[:2]  # noqa: E731
        return run_compacted(layer, delta, x, ids, positions, living, rules=RULES, buckets=buckets)

    skip = functools.partial(nn.apply(call, layer), {"params": params}, jnp.zeros(ids.shape, bool))
    update, extras = skip((0, TOKENS))
    assert not update.any() and float(extras["size"]) == 0
    assert all(np.array_equal(a, b) for a, b in zip((update, extras["size"]), (skip(None)[0], 0.0), strict=True))
    for wrong in ((), (0, 3), (6, 3, TOKENS), (-1, TOKENS)):
        with pytest.raises(ValueError, match="buckets"):
            skip(wrong)


# Decoding


def empty(rows: int):
    return {"total": jnp.zeros((LAYERS, rows, WIDTH)), "segment": jnp.full((LAYERS, rows), -1, jnp.int32)}


@pytest.mark.parametrize("parts", [(1,) * TOKENS, (5, 1, 6)])
def test_decoding_equals_the_whole(parts):
    x, ids, positions = inputs()
    whole, begin, cache, outputs = run()(parameters(), x, ids, positions)[0], 0, empty(3), []
    for size in parts:
        ends = slice(begin, begin + size)
        state, (_, cache) = run()(parameters(), x[:, ends], ids[:, ends], positions[:, ends], cache)
        outputs.append((state.output, state.layers))
        begin += size
    np.testing.assert_allclose(jnp.concatenate([o for o, _ in outputs], 1), whole.output, atol=1e-5)
    np.testing.assert_array_equal(jnp.concatenate([n for _, n in outputs], 1), whole.layers)


def test_a_halted_row_leaves_its_cache_untouched():
    x, ids, positions = inputs()
    cache = jax.tree.map(lambda leaf: leaf + 3, empty(3))
    first = (x[:, :1], ids[:, :1], positions[:, :1])
    state, (_, new) = run()(parameters(), *first, cache)
    deep = np.arange(LAYERS)[:, None] < np.asarray(state.layers)[:, 0]  # [layer, row]
    assert deep.any() and not deep.all()
    np.testing.assert_array_equal((np.asarray(new["total"]) != np.asarray(cache["total"])).any(-1), deep)
    np.testing.assert_array_equal(np.asarray(new["segment"]) != np.asarray(cache["segment"]), deep)
    kept = keep_where(jnp.asarray([True, False]), {"a": jnp.ones((2, 3, 1))}, {"a": jnp.zeros((2, 3, 1))})
    np.testing.assert_array_equal(kept["a"][:, :, 0], [[1, 1, 1], [0, 0, 0]])


# Devices and time


@pytest.mark.exhaustive  # its layers and its loss are cut over meshes in their own tests
def test_a_mesh_changes_nothing():
    x, ids, positions = (jnp.concatenate([leaf, leaf[:1]]) for leaf in inputs())
    first = (x[:, :1], ids[:, :1], positions[:, :1])

    @jax.jit
    def everything(params, args, first, cache):
        decoded, (_, new) = Stack().apply({"params": params}, *first, cache)
        return train(params, args, (0, 6, TOKENS)), decoded, new

    alone = everything(parameters(), (x, ids, positions), first, empty(4))
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        args, first = placed(x, ids, positions), placed(*first)
        shapes = jax.eval_shape(lambda key: Stack().init(key, *args), jax.random.key(0))["params"]
        params = jax.tree.map(lambda leaf, shape: reshard(leaf, shape.sharding.spec), parameters(), shapes)
        spread = everything(params, args, first, empty(4))
    (gradient, (state, _)), _, _ = spread
    assert state.output.sharding.spec == RULES.spec("batch", None, None)
    assert state.halted.sharding.spec == RULES.spec("batch", None)
    assert gradient["exit"]["hidden"]["w"].sharding.spec == RULES.spec("embed", None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), alone, spread)


def placed(x, ids, positions):
    rows = RULES.spec("batch", None)
    return reshard(x, RULES.spec("batch", None, None)), reshard(ids, rows), reshard(positions, rows)


class Wide(nn.Module):
    """A layer whose time is its matrices': [d, 4d] and back."""

    @nn.compact
    def __call__(self, x, segment_ids, positions):
        init = nn.initializers.normal(0.02)
        up, down = self.param("up", init, (256, 1024)), self.param("down", init, (1024, 256))
        return jax.nn.silu(x @ up) @ down, {}


def test_time_falls_with_the_tokens():
    ids = jnp.ones((2, 512), jnp.int32)
    x, positions = jnp.ones((2, 512, 256)), jnp.zeros_like(ids)
    layer, params = Wide(), Wide().init(jax.random.key(0), x, ids, positions)
    call = lambda layer, *args: run_compacted(  # noqa: E731
        layer, lambda layer, *a: layer(*a), *args, rules=RULES, buckets=bucket_lengths(512)
    )
    program = jax.jit(nn.apply(call, layer))
    eighth = ids * jnp.arange(512)[None] % 8 == 0

    def seconds(living) -> float:
        best = np.inf
        for _ in range(12):
            begun = time.perf_counter()
            jax.block_until_ready(program(params, x, ids, positions, living))
            best = min(best, time.perf_counter() - begun)
        return best

    seconds(eighth)
    whole, part, nothing = seconds(ids > 0), seconds(eighth), seconds(ids < 0)
    assert part < whole / 2 and nothing < whole / 4, (whole, part, nothing)
