"""What every mixer must pass: causal by gradient, prefix, segments apart, rows apart, odd lengths, float64.

D and G, each as our models have it and with everything the origin system does otherwise; A as two families have it,
whole and with a window in tiles; B. The origin's variance over the
row gives up the prefix property and what follows from it (segments apart, lengths), through the budget alone: with the
budget at rest ("G origin" under `resting`) all hold, and `test_row_variance_…` say what is left when it moves.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.model import DeltaNetConfig, GSAConfig
from gt_jax.configs.resolvent import ResolventConfig
from gt_jax.devices.sharding import Rules, make_mesh, put_like, with_mesh_devices
from gt_jax.models.layers import attention, deltanet, gsa, primitives, resolvent
from gt_jax.models.layers.mixer import Place, place_rows
from gt_jax.models.layers.primitives import WeightSpec, rope, widen
from tests.models.layers import oracle
from tests.rarely import rarely
from tests.support import ATTENTION, DELTANET, GSA, RESOLVENT, WIDTH, segments

FLOOR = -0.7  # high enough that some tokens of these layers reach it
D_VARIANTS = [
    {"rope": "standard"}, {"rope": "origin"}, {"conv_bias": True}, {"read_scale": 1.0}, {"skip": True},
    {"activation_on": "output"}, {"decay_floor": FLOOR}, {"beta_max": 2.0}, {"head_gate_bias": False},
    {"output_epsilon": 1e-2},
]  # fmt: skip
G_VARIANTS = [{"rope": "none"}, {"rope": "origin"}, {"score_scale": 1.0}, {"variance": "row"}]
A_VARIANTS = [
    {"gate": False}, {"qk_norm": "none"}, {"qk_norm": "all"}, {"rope": "none"}, {"rope_share": 1.0}, {"rope_base": 1e7},
    {"kv_heads": 1, "bias": True}, {"kv_heads": 4}, {"window": 3},
]  # fmt: skip
D_ORIGIN = DELTANET.replace(
    rope="origin", conv_bias=True, read_scale=1.0, skip=True, activation_on="output", decay_floor=FLOOR
)
G_ORIGIN = GSA.replace(rope="origin", score_scale=1.0, variance="row")
A_WINDOW = ATTENTION.replace(qk_norm="all", rope="none", rope_share=1.0, gate=False, window=10, implementation="xla")
B_VARIANTS = [{"coupling": "learned"}, {"bound": 1.0}]
PLAIN = {"D": DELTANET, "G": GSA, "A": ATTENTION, "B": RESOLVENT}
CONFIGS = {**PLAIN, "D origin": D_ORIGIN, "G origin": G_ORIGIN, "A window": A_WINDOW}
KINDS = tuple(CONFIGS)
TYPES = [kind if kind in PLAIN else rarely(kind) for kind in KINDS]
CONFIGS["G tiles"] = GSA.replace(implementation="xla")  # tests/kernels/test_sparse_attention.py
EMA = 0.004  # about the variance of the scores, so that budgets lie between their bounds


def mixer(config: DeltaNetConfig | GSAConfig | AttentionConfig | ResolventConfig, dtype: str = "float32"):
    types = {DeltaNetConfig: deltanet.GatedDeltaNet, GSAConfig: gsa.GatedSparseAttention,
             AttentionConfig: attention.FullAttention, ResolventConfig: resolvent.LeftResolvent}  # fmt: skip
    return types[type(config)](config, WIDTH, Rules(), WeightSpec("float32", dtype))


@functools.cache
def variables(config):
    """Drawn by numpy from the shapes, no parameter at a special value; compiling `init` would take most of the time."""
    x, ids = jnp.zeros((1, 4, WIDTH)), jnp.zeros((1, 4), jnp.int32)
    shapes = dict(jax.eval_shape(mixer(config).init, jax.random.key(0), x, place_rows(ids)))
    draw = np.random.default_rng(1)
    middle = {f"{name}_norm/scale": 1.0 for name in ("output", "query", "key")}
    middle |= {"skip": 1.0, "a_log": 1.0, "dt_bias": -2.0}
    flat = {
        name: jnp.asarray(middle.get(name, 0.0) + 0.3 * draw.standard_normal(leaf.shape), leaf.dtype)
        for name, leaf in flatten(shapes["params"]).items()
    }
    moved = {"params": nest(flat)}
    if isinstance(config, GSAConfig):
        moved["statistics"] = {"variance_ema": jnp.asarray(EMA, jnp.float32)}
    return moved


def resting(kind: str):
    """The variables with which a prefix gives the same answer: row variance as in a fresh layer, budget k_base."""
    v = variables(CONFIGS[kind])
    return {**v, "statistics": {"variance_ema": jnp.zeros(())}} if kind == "G origin" else v


@functools.cache
def run(kind: str):
    return jax.jit(lambda v, x, ids: mixer(CONFIGS[kind]).apply(v, x, place_rows(ids)).y)


@functools.cache
def resume(kind: str):
    """The mixer on tokens after those the cache has seen: (variables, x, ids, cache, start) -> MixerOutput."""
    apply = mixer(CONFIGS[kind]).apply
    return jax.jit(lambda v, x, ids, cache, start: apply(v, x, place_rows(ids, start), cache))


def empty(kind: str, rows: int, tokens: int):
    if kind[0] in "DB":
        return {"D": deltanet, "B": resolvent}[kind[0]].empty_cache(CONFIGS[kind], rows, "float32")
    return {"G": gsa, "A": attention}[kind[0]].empty_cache(CONFIGS[kind], rows, tokens, "float32")


def in_parts(kind: str, v, x, ids, sizes):
    """The outputs of x fed part by part through the cache."""
    cache, start, parts = empty(kind, *ids.shape), 0, []
    for size in sizes:
        ends = slice(start, start + size)
        output = resume(kind)(v, x[:, ends], ids[:, ends], cache, jnp.full((len(ids),), start, jnp.int32))
        parts.append(output.y)
        cache, start = output.cache, start + size
    return parts


def inputs(tokens: int, rows: int = 1, seed: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, tokens, WIDTH))


def three_rows():
    """What most tests feed, so that few shapes are compiled: three rows of 20 tokens, one of two documents."""
    return inputs(20, rows=3), jnp.concatenate([segments(20), segments(6, 14), segments(20)])


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_depends_on_a_later_input(kind):
    x, ids, v = inputs(20), segments(20), variables(CONFIGS[kind])
    reach = jax.jit(jax.grad(lambda x, token: run(kind)(v, x, ids)[0, token].sum()))
    for token in (0, 8, 15, 16, 18):
        size = np.abs(np.asarray(reach(x, token)))[0].sum(-1)
        assert np.all(size[token + 1 :] == 0)
        assert size[token] > 0
    assert size[:10].max() > 0  # and the past is read, or the test would say nothing
    changed = run(kind)(v, x.at[:, 16:].set(3.0), ids)  # the selection of keys has no gradient, so by value too
    np.testing.assert_allclose(changed[:, :16], run(kind)(v, x, ids)[:, :16], atol=1e-6)


@pytest.mark.parametrize("kind", TYPES)
def test_prefix_then_rest_with_cache_equals_the_whole(kind):
    x, ids = three_rows()
    whole = run(kind)(resting(kind), x, ids)
    # the second part crosses the boundary of row 1's documents
    parts = in_parts(kind, resting(kind), x, ids, (1, 17, 1, 1))
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_packed_documents_are_apart(kind):
    lengths = (1, 2, 17)
    x, ids = inputs(sum(lengths)), segments(*lengths)
    packed = run(kind)(resting(kind), x, ids)
    start = 0
    for n in lengths:
        alone = run(kind)(resting(kind), x[:, start : start + n], segments(n))
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=1e-5)
        start += n


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_a_batch_are_independent(kind):
    x, ids = three_rows()
    together = run(kind)(variables(CONFIGS[kind]), x, ids)
    changed = run(kind)(variables(CONFIGS[kind]), x.at[1].set(7.0), ids)
    assert np.array_equal(together[0], changed[0]) and np.array_equal(together[2], changed[2])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, rarely(15), 17])
def test_lengths_beside_the_chunk_agree_with_a_longer_row(kind, tokens):
    x = inputs(20)
    whole = run(kind)(resting(kind), x, segments(20))
    part = run(kind)(resting(kind), x[:, :tokens], segments(tokens))
    np.testing.assert_allclose(part, whole[:, :tokens], atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_a_thousand_tokens(kind):
    x = inputs(1000)
    whole = run(kind)(resting(kind), x, segments(1000))
    part = run(kind)(resting(kind), x[:, :65], segments(65))
    np.testing.assert_allclose(part, whole[:, :65], atol=1e-5)


def in_float64(config, x, ids):
    """(the mixer's output, the oracle's) on one row; under `jax.enable_x64`."""
    wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), variables(config))
    got = mixer(config, "float64").apply(wide, jnp.asarray(np.asarray(x), jnp.float64), place_rows(ids)).y
    assert got.dtype == jnp.float64
    params, row, ids = jax.tree.map(np.asarray, wide["params"]), np.asarray(x[0], np.float64), np.asarray(ids[0])
    return got[0], equations(params, config, row, ids)


def equations(params, config, row, ids):
    """The oracle's output on one row."""
    if isinstance(config, GSAConfig):
        return oracle.gsa(params, config, row, ids, float(np.float32(EMA)))[0]
    of = {DeltaNetConfig: oracle.deltanet, AttentionConfig: oracle.attention, ResolventConfig: oracle.resolvent}
    return of[type(config)](params, config, row, ids)


CASES = {
    **{kind: CONFIGS[kind] for kind in KINDS},
    **{f"D {change}": DELTANET.replace(**change) for change in D_VARIANTS},
    **{f"G {change}": GSA.replace(**change) for change in G_VARIANTS},
    **{f"A {change}": ATTENTION.replace(**change) for change in A_VARIANTS},
    **{f"B {change}": RESOLVENT.replace(**change) for change in B_VARIANTS},
}


@pytest.mark.parametrize("case", CASES)
def test_float64_agrees_with_the_equations_token_by_token(case):
    config, plain = CASES[case], PLAIN[case[0]]
    with jax.enable_x64(True):
        got, wanted = in_float64(config, inputs(24), segments(3, 13, 8))
        np.testing.assert_allclose(got, wanted, atol=1e-10)
        shapes = [jax.tree.map(jnp.shape, variables(c)["params"]) for c in (config, plain)]
        if config != plain and shapes[0] == shapes[1]:
            # the variant does something here: the plain equations miss by far more
            params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables(config)["params"])
            row, ids = np.asarray(inputs(24)[0], np.float64), np.asarray(segments(3, 13, 8)[0])
            assert np.abs(got - equations(params, plain, row, ids)).max() > 1e-7


def test_row_variance_costs_the_prefix_property_through_the_keys_alone():
    kind, part, x, v = "G origin", 15, inputs(20), variables(G_ORIGIN)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), v["params"])
    row = np.asarray(x[0], np.float64)
    chosen = [oracle.gsa(params, G_ORIGIN, row[:n], np.ones(n, int), EMA)[1] for n in (part, 20)]
    same = np.asarray([all(chosen[0][i, h] == chosen[1][i, h] for h in range(GSA.heads)) for i in range(part)])
    alone, whole = run(kind)(v, x[:, :part], segments(part)), run(kind)(v, x, segments(20))
    difference = np.abs(whole[0, :part] - alone[0]).max(-1)
    assert np.all(difference[same] < 1e-5)
    assert np.all(difference[~same] > 1e-4)
    assert 0 < same.sum() < part


def test_row_variance_in_decoding_counts_the_row_so_far():
    kind, sizes = "G origin", (15, 5)
    x, ids, v = inputs(20), segments(9, 11), variables(G_ORIGIN)
    end = 0
    for size, part in zip(sizes, in_parts(kind, v, x, ids, sizes), strict=True):
        end += size
        so_far = run(kind)(v, x[:, :end], ids[:, :end])
        np.testing.assert_allclose(part, so_far[:, end - size :], atol=1e-5)


def test_keys_are_cached_at_their_own_positions():
    x, ids = inputs(6), jnp.asarray([[1, 1, 1, 0, 1, 1]])
    positions, room = jnp.asarray([[0, 2, 3, 5, 7, 9]]), 9
    place = Place(ids, positions, jnp.zeros((1,), jnp.int32))
    v = variables(GSA)
    apply = jax.jit(lambda x, place, cache: mixer(GSA).apply(v, x, place, cache))
    output = apply(x, place, gsa.empty_cache(GSA, 1, room, "float32"))
    # padding (position 5) and what lies past the room (position 9) are not written; the gaps stay empty
    assert output.cache["segments"].tolist() == [[1, -1, 1, 1, -1, -1, -1, 1, -1]]
    assert np.all(np.asarray(output.cache["key"][0, [1, 4, 5, 6, 8]]) == 0)
    without = apply(x, Place(ids, positions), None)
    seen = np.asarray([0, 1, 2, 4])
    np.testing.assert_allclose(output.y[:, seen], without.y[:, seen], atol=1e-5)


def test_a_later_part_leaves_what_is_cached_alone():
    kind, v, x = "G origin", variables(G_ORIGIN), inputs(20)
    cache = resume(kind)(v, x[:, :15], segments(15), empty(kind, 1, 20), jnp.zeros((1,), jnp.int32)).cache
    later = resume(kind)(v, x[:, 15:], segments(5), cache, jnp.full((1,), 15, jnp.int32)).cache
    for name in cache:
        assert np.array_equal(cache[name][:, :15], later[name][:, :15])
    assert later["segments"].tolist() == [[1] * 20]


# the others: test_language_model.py
@pytest.mark.parametrize("kind", ["D origin", rarely("G origin"), "G tiles", "A", rarely("A window"), "B"])
def test_a_mesh_gives_the_same_values(kind):
    x, ids = three_rows()
    v = variables(CONFIGS[kind])
    wanted = jax.device_get(run(kind)(v, x, ids))
    with jax.set_mesh(make_mesh(data=3, tensor=2, devices=jax.devices()[:6])):
        place = lambda a: jax.sharding.reshard(a, Rules().spec("batch", *[None] * (a.ndim - 1)))  # noqa: E731
        x, ids = place(x), place(ids)
        shapes = jax.eval_shape(mixer(CONFIGS[kind]).init, jax.random.key(0), x, place_rows(ids))
        there = put_like(v, jax.tree.map(with_mesh_devices, dict(shapes)))
        got = jax.device_get(run(kind)(there, x, ids))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_bfloat16_stays_near_float32(kind):
    x, ids, v = inputs(20), segments(20), variables(CONFIGS[kind])
    exact = run(kind)(v, x, ids)
    low = jax.jit(lambda x: mixer(CONFIGS[kind], "bfloat16").apply(v, x, place_rows(ids)).y)(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    size = lambda a: np.sqrt(np.mean(np.square(a, dtype=np.float32), axis=-1))[0]  # noqa: E731
    error = size(low.astype(jnp.float32) - exact) / size(exact)
    # of the tokens, not of the row: a read near 0 is magnified by its norm, a G layer may select another key
    assert np.median(error) < (0.02 if kind.startswith("D") else 0.04)
    assert np.mean(error) < (0.05 if kind.startswith("D") else 0.2)


@pytest.mark.parametrize("table", ["standard", "origin"])
def test_rotary_embedding_knows_only_distances(table):
    q, k = jax.random.normal(jax.random.key(5), (2, 1, 1, 1, 16))
    at = lambda x, i: rope(x, jnp.full((1, 1), i, jnp.int32), 10000.0, table)  # noqa: E731
    near, far = (jnp.sum(at(q, i + 3) * at(k, i)) for i in (0, 40))
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert abs(jnp.sum(at(q, 4) * at(k, 0)) - near) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(at(q, 9)), jnp.linalg.norm(q), rtol=1e-5)


@pytest.mark.parametrize("table, turned", [
    ("origin", None), rarely("standard", None), ("standard", 6), rarely("origin", 4)])
def test_the_turn_of_a_tpu_is_the_turn_of_pairs(monkeypatch, table, turned):
    """A product with a matrix of signs, against pairs taken apart: values, gradients, and what is not turned."""
    x, weight = jax.random.normal(jax.random.key(6), (2, 2, 9, 3, 16))
    positions = jnp.arange(18, dtype=jnp.int32).reshape(2, 9)
    made = lambda x: rope(x, positions, 100.0, table, turned)  # noqa: E731
    pulled = jax.value_and_grad(lambda x: jnp.sum(made(x) * weight))
    half = x.astype(jnp.bfloat16)
    here, of_half = pulled(x), made(half)
    monkeypatch.setattr(primitives, "target_device", lambda: ("tpu", "TPU v5"))
    chex.assert_trees_all_close(pulled(x), here, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(made(half)[..., (turned or 16) :], half[..., (turned or 16) :])
    np.testing.assert_allclose(*(widen(y) for y in (made(half), of_half)), atol=2.0**-7)  # an ulp: 2 * 2^-8
    program = str(jax.make_jaxpr(pulled)(x))
    assert "dot_general" in program and "concatenate" not in program  # moved lanes are written out in float32


@pytest.mark.parametrize("count", [rarely(1), 2, 9])
def test_the_short_convolution_has_the_gradients_of_its_definition(count):
    """Of a sum over the taps, token by token, in float64: also where the row is shorter than the taps."""
    with jax.enable_x64(True):
        shapes = {"x": (2, count, 3, 2), "window": (2, 3, 3, 2), "weight": (4, 3, 2), "bias": (3, 2)}
        keys = jax.random.split(jax.random.key(7), 5)
        inputs = {name: jax.random.normal(key, shape, jnp.float64)
                  for key, (name, shape) in zip(keys[:4], shapes.items(), strict=True)}  # fmt: skip
        pull = jax.random.normal(keys[4], shapes["x"], jnp.float64)
        own = jnp.asarray(np.repeat([[1, 2, 4], [3, 3, 5]], [2, 3, 4], axis=1)[:, :count], jnp.int32)
        before = jnp.asarray([[-1, 1, 1], [3, 3, 3]], jnp.int32)

        def plain(p):
            rows, of = jnp.concatenate([p["window"], p["x"]], 1), jnp.concatenate([before, own], 1)
            return jnp.stack([sum((of[:, t + j] == own[:, t])[:, None, None] * rows[:, t + j] * p["weight"][j][None]
                                  for j in range(4)) + p["bias"][None] for t in range(count)], axis=1)  # fmt: skip

        def ours(p):
            return primitives.short_convolution(p["x"], p["weight"], own, p["window"], before, p["bias"])

        (y, back), (wanted, back_wanted) = (jax.vjp(jax.jit(f), inputs) for f in (ours, plain))
        chex.assert_trees_all_close((y, back(pull)), (wanted, back_wanted(pull)), atol=1e-12)
