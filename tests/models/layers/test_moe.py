"""The mixture of experts: equal to a loop over tokens and picks, dropless, the same on a mesh, honest about padding."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from gt_jax.configs.model import MoEConfig
from gt_jax.devices.sharding import Rules, make_mesh, reshard
from gt_jax.models.layers import grouped_product, moe
from gt_jax.models.layers.primitives import WeightSpec
from tests.models.layers.oracle import silu
from tests.support import assert_rounded_alike, random_tree

WIDTH, SHARED = 16, 12
HALF = MoEConfig(experts=4, expert_width=8)
CONFIGS = {
    "half": HALF,
    "third": MoEConfig(experts=4, expert_width=8, top_k=3, real_share=1 / 3),
    "no nulls": MoEConfig(experts=4, expert_width=8, real_share=1.0, balance_loss=0.3),
}


def layer(config: MoEConfig, dtype: str = "float32") -> moe.MixtureOfExperts:
    return moe.MixtureOfExperts(config, WIDTH, SHARED, Rules(), WeightSpec("float32", dtype))


@functools.cache
def params(config: MoEConfig):
    with jax.enable_x64(False):
        x = jnp.zeros((1, 2, WIDTH))
        shapes = jax.eval_shape(layer(config).init, jax.random.key(0), x, x[..., 0])["params"]
        return random_tree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), seed=1)


@functools.cache
def step(config: MoEConfig, dtype: str = "float32"):
    """(p, x, real) -> (the output, gradients of `loss` in p and x): one compilation for all that a test may ask."""

    def loss(p, x, real):
        out = layer(config, dtype).apply({"params": p}, x, real)
        return jnp.sum(jnp.sin(out.y) * real[..., None]) + 100 * out.auxiliary_loss, out

    def outputs(p, x, real):
        gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(p, x, real)
        return out, gradients

    return jax.jit(outputs)


def inputs(rows: int = 2, tokens: int = 12, seed: int = 2) -> tuple[jax.Array, jax.Array]:
    """x, and real with padding at the end of the last row."""
    x = jax.random.normal(jax.random.key(seed), (rows, tokens, WIDTH))
    return x, jnp.ones((rows, tokens)).at[-1, -4:].set(0.0)


route = jax.jit(moe.route, static_argnums=(1, 2))
dispatch = jax.jit(grouped_product.dispatch, static_argnums=(1, 2))


def with_router(p, **changes):
    return {**p, "router": {name: jnp.array(changes.get(name, a), a.dtype) for name, a in p["router"].items()}}


def wide(tree):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)


def swiglu(p, x):
    return (silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def expert(p, i=None):
    return {name: leaf["w"] if i is None else leaf["w"][i] for name, leaf in p.items()}


def oracle(p, x, real, config: MoEConfig):
    """REFERENCE section 4, token by token and pick by pick, in float64."""
    p, x, real = jax.tree.map(lambda a: np.asarray(a, np.float64), (p, x, real))
    e, nulls = config.experts, config.null_experts
    y, taken, null_picks, z, entropy, mean_real, tokens = np.zeros_like(x), np.zeros(e), 0, 0.0, 0.0, np.zeros(e), 0
    for at in np.ndindex(real.shape):
        y[at] = swiglu(expert(p["shared"]), x[at])
        logits = x[at] @ p["router"]["w"] + p["router"]["b"]
        slots = np.concatenate([logits, np.full(nulls, p["router"]["null_logit"])])
        shares = np.exp(slots) / np.exp(slots).sum()
        picks = sorted(range(e + nulls), key=lambda i: (-slots[i], i))[: config.top_k]
        chosen = [i for i in picks if i < e]
        if real[at] == 0:
            continue
        for i in chosen:
            y[at] += shares[i] / sum(shares[j] for j in chosen) * swiglu(expert(p["experts"], i), x[at])
            taken[i] += 1
        null_picks += config.top_k - len(chosen)
        tokens += 1
        z += np.log(np.exp(slots).sum()) ** 2
        entropy -= (shares * np.log(shares)).sum() / np.log(e + nulls)
        mean_real += np.exp(logits) / np.exp(logits).sum()
    share = taken / max(taken.sum(), 1)
    null_rate = null_picks / (tokens * config.top_k)
    auxiliary = config.balance_loss * e * (share * mean_real / tokens).sum() + config.router_z_loss * z / tokens
    auxiliary += config.null_loss * (null_rate - (1 - config.real_share)) ** 2
    return moe.MLPOutput(y, auxiliary, share, null_rate, entropy / tokens)


def dense_loss(p, x, real, config: MoEConfig):
    """The loss of `step`, every expert computed for every token and weighted by its share of softmax(slots) or by 0."""
    e, k = config.experts, config.top_k
    logits = x @ p["router"]["w"] + p["router"]["b"][None, None]
    nulls = jnp.full((*x.shape[:2], config.null_experts), 1.0) * p["router"]["null_logit"]
    slots = jnp.concatenate([logits, nulls], axis=-1)
    p_slots = jax.nn.softmax(slots, axis=-1)
    order = jnp.argsort(-slots, axis=-1, stable=True)[..., :k]
    picked = jnp.sum(jax.nn.one_hot(order, slots.shape[-1], dtype=x.dtype), axis=-2)
    weights = p_slots[..., :e] * picked[..., :e]
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    w = expert(p["experts"])
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, w["gate"])) * jnp.einsum("btd,edf->btef", x, w["up"])
    routed = jnp.einsum("btef,efd,bte->btd", hidden, w["down"], weights)
    s = expert(p["shared"])
    y = (jax.nn.silu(x @ s["gate"]) * (x @ s["up"])) @ s["down"] + routed
    mean = lambda value: jnp.sum(value * real) / jnp.sum(real)  # noqa: E731
    taken = jnp.sum(picked[..., :e] * real[..., None], axis=(0, 1))
    p_real = jax.nn.softmax(logits, axis=-1)
    balance = e * sum(taken[i] / jnp.sum(taken) * mean(p_real[..., i]) for i in range(e))
    null_rate = mean(jnp.sum(picked[..., e:], axis=-1) / k)
    probability = mean(jnp.sum(p_slots[..., e:], axis=-1))
    excess = (null_rate - (1 - config.real_share) + probability - jax.lax.stop_gradient(probability)) ** 2
    auxiliary = config.balance_loss * balance + config.null_loss * excess
    auxiliary += config.router_z_loss * mean(jax.nn.logsumexp(slots, axis=-1) ** 2)
    return jnp.sum(jnp.sin(y) * real[..., None]) + 100 * auxiliary


def close(got, wanted, atol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), tuple(got), tuple(wanted))


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_equal_a_loop_over_tokens_and_every_expert_for_every_token(name):
    config = CONFIGS[name]
    with jax.enable_x64(True):
        p, x, real = wide((params(config), *inputs()))
        got, gradients = step(config, "float64")(p, x, real)
        assert {leaf.dtype for leaf in got} == {jnp.dtype("float64")}
        close(got, oracle(p, x, real, config))
        wanted = jax.jit(jax.grad(functools.partial(dense_loss, config=config), argnums=(0, 1)))(p, x, real)
        close(gradients, wanted)
        if config.null_experts:
            assert 0.1 < got.null_rate < 0.9  # or the test would not see both kinds of pick
            assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(wanted))


def test_the_null_loss_pulls_the_null_rate_to_the_share_of_null_slots():
    logits, real = inputs()[0][..., :4], inputs()[1]

    def loss(null_logit):
        slots = jnp.concatenate([logits, jnp.full((*real.shape, 4), null_logit)], axis=-1)
        picks = moe.route(slots, 4, 2).experts
        return moe.router_losses(HALF.replace(balance_loss=0.0, router_z_loss=0.0), slots, picks, real)[0]

    pull = jax.jit(jax.grad(loss))
    assert pull(3.0) > 0  # too many nulls: the logit must fall
    assert pull(-3.0) < 0


def test_no_pick_is_dropped_when_all_tokens_want_one_expert():
    with jax.enable_x64(True):
        p, x, real = wide((params(HALF), *inputs()))
        p = with_router(p, b=[-40.0, -50.0, 40.0, -60.0], null_logit=0.0)
        got, _ = step(HALF, "float64")(p, x, real)
        close(got, oracle(p, x, real, HALF))
        np.testing.assert_array_equal(got.experts, [0, 0, 1, 0])
        assert got.null_rate == 0.5


def test_ties_go_to_the_smaller_index_and_real_slots_come_before_null_ones():
    np.testing.assert_array_equal(route(jnp.zeros((1, 1, 8)), 4, 3).experts[0, 0], [0, 1, 2])
    np.testing.assert_array_equal(route(jnp.zeros((1, 1, 3)), 1, 3).experts[0, 0], [0, 1, 1])
    slots = jnp.asarray([0.0, 1.0, 0.0, 1.0, 1.0, 1.0])[None, None]
    np.testing.assert_array_equal(route(slots, 4, 3).experts[0, 0], [1, 3, 4])
    np.testing.assert_allclose(route(slots, 4, 3).weights[0, 0], [0.5, 0.5, 0.0])


def test_tokens_whose_picks_are_all_null_get_the_shared_expert_alone():
    x, real = inputs()
    p = with_router(params(HALF), null_logit=60.0)
    out, (through_p, through_x) = step(HALF)(p, x, real)
    close([out.y], [swiglu(expert(jax.tree.map(np.asarray, p["shared"])), np.asarray(x))], atol=1e-5)
    assert out.null_rate == 1
    np.testing.assert_array_equal(out.experts, np.zeros(4))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((through_p, through_x)))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(through_p["experts"]))


def test_weights_of_real_picks_sum_to_one_however_unlikely_they_are():
    slots = jax.random.normal(jax.random.key(3), (4, 16, 6)) * 3
    routing = route(slots.at[..., 4:].add(1.0), 4, 3)
    real = np.asarray(routing.experts) < 4
    np.testing.assert_allclose(routing.weights.sum(-1), real.any(-1), atol=1e-6)
    assert not np.any(np.asarray(routing.weights)[~real])
    unlikely = jnp.asarray([-300.0, -301.0, -400.0, 0.0])[None, None]  # softmax underflows at the real slots
    np.testing.assert_allclose(route(unlikely, 3, 3).weights[0, 0], [0, 1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    reach = jax.grad(lambda s: jnp.sum(route(s, 3, 2).weights))(unlikely)
    np.testing.assert_allclose(reach, 0, atol=1e-7)  # a single real pick has weight 1, whatever its logit


def test_padding_changes_no_loss_statistic_or_expert():
    x, real = inputs()
    other = jnp.where(real[..., None] > 0, x, 50 * x + 3)
    (a, (through_a, _)), (b, (through_b, _)) = (step(HALF)(params(HALF), z, real) for z in (x, other))
    close(a[1:], b[1:], atol=0)
    close([a.y[0]], [b.y[0]], atol=0)
    close([through_a], [through_b], atol=1e-5)
    nobody, _ = step(HALF)(params(HALF), x, jnp.zeros_like(real))
    assert all(np.isfinite(leaf).all() for leaf in nobody)
    assert np.isfinite(b.y).all() and not np.any(nobody.experts)


def test_a_token_does_not_feel_the_others():
    x, real = inputs()[0], jnp.ones((2, 12))
    order = np.random.default_rng(0).permutation(24)
    shuffle = lambda a: a.reshape(24, -1)[order].reshape(a.shape)  # noqa: E731
    (out, _), (shuffled, _) = (step(HALF)(params(HALF), z, real) for z in (x, shuffle(x)))
    close([shuffled.y, *shuffled[1:]], [shuffle(out.y), *out[1:]], atol=1e-6)
    changed = step(HALF)(params(HALF), x.at[0, 5].set(9.0), real)[0].y
    rest = np.ones((2, 12), bool)
    rest[0, 5] = False
    np.testing.assert_allclose(np.asarray(changed)[rest], np.asarray(out.y)[rest], atol=1e-6)
    assert np.abs(changed - out.y).max() > 1


def test_bfloat16_products_leave_the_routing_in_float32():
    x, real = inputs()
    (exact, _), (low, _) = step(HALF)(params(HALF), x, real), step(HALF, "bfloat16")(params(HALF), x, real)
    assert low.y.dtype == jnp.bfloat16
    close(low[1:], exact[1:], atol=1e-6)  # loss, shares and null rate know every logit and every decision
    assert np.abs(low.y.astype(jnp.float32) - exact.y).max() < 0.02 * np.abs(exact.y).max()
    rounded = x.astype(jnp.bfloat16)
    from_low, _ = step(HALF, "bfloat16")(params(HALF), rounded, real)
    from_wide, _ = step(HALF)(params(HALF), rounded.astype(jnp.float32), real)
    close(from_low[1:], from_wide[1:], atol=1e-6)


def test_a_mesh_gives_the_same_values_statistics_and_gradients():
    """There gate and up are one matrix, and down is gathered turned: alone, these few tokens have neither."""
    x, real = inputs()
    wanted = jax.device_get(step(HALF)(params(HALF), x, real))
    with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):
        batch = Rules().spec("batch", None, None)
        x, real = reshard(x, batch), reshard(real, Rules().spec("batch", None))
        shapes = jax.eval_shape(layer(HALF).init, jax.random.key(0), x, real)["params"]
        assert shapes["experts"]["gate"]["w"].sharding.spec == jax.P("expert", "fsdp", "tensor")
        assert shapes["experts"]["down"]["w"].sharding.spec == jax.P("expert", "tensor", "fsdp")
        got = step(HALF)(jax.tree.map(lambda a, shape: reshard(a, shape.sharding.spec), params(HALF), shapes), x, real)
        assert jax.typeof(got[0].y).sharding.spec == batch
    # router, three products of an expert, their sum, there and back; sums over 24 tokens, or over a width
    assert_rounded_alike(jax.device_get(got), wanted, terms=WIDTH, chain=2 * 5)


@pytest.mark.parametrize("seed", range(3))
def test_every_pick_has_one_row_in_its_experts_run(seed):
    random = np.random.default_rng(seed)
    for count, block, skew in ((4, 1, 1), (4, 4, 1), (5, 8, 3), (1, 4, 1)):
        picks = np.floor((count + 1) * random.random(40) ** skew).astype(np.int32)  # `count` is a pick of no expert
        rows, place, sizes = map(np.asarray, dispatch(jnp.asarray(picks), count, block))
        assert np.all(sizes % block == 0) and sizes.sum() <= rows.size <= 40 + count * (block - 1)
        for i, run_of_expert in enumerate(np.split(rows, np.cumsum(sizes))[:count]):
            np.testing.assert_array_equal(run_of_expert[run_of_expert < 40], np.flatnonzero(picks == i))
        assert np.all(rows[sizes.sum() :] == 40)
        np.testing.assert_array_equal(place[picks == count], rows.size)
        np.testing.assert_array_equal(rows[place[picks < count]], np.flatnonzero(picks < count))


def test_rows_are_spread_and_collected_without_scattering_and_each_is_the_others_transpose():
    """Against a gather and a sum of scattered rows, whose derivatives are JAX's own; twice differentiable. Rows without
    a pick are nobody's: nothing is asked of them."""
    picks = np.random.default_rng(1).integers(0, 4, (6, 2)).astype(np.int32)  # 3 experts, and none
    made = dispatch(jnp.asarray(picks.reshape(-1)), 3, 2)
    token, rows = made.pick // 2, made.row.reshape(6, 2)
    x, y = jax.random.normal(jax.random.key(1), (6, 5)), jax.random.normal(jax.random.key(2), (token.size, 5))

    def gathered(x):
        return x.at[token].get(mode="fill", fill_value=0)

    def scattered(y):
        return jnp.zeros((6, 5)).at[token].add(y, mode="drop")

    real = (token < 6).astype(jnp.float32)[:, None]
    for at, ours, plain in ((x, lambda a: real * grouped_product.spread(a, token, rows), gathered),
                            (y, lambda a: grouped_product.collect(real * a, token, rows), scattered)):  # fmt: skip
        mine = jax.value_and_grad(lambda a, f=ours: jnp.sum(jnp.sin(f(a))))
        wanted = jax.value_and_grad(lambda a, f=plain: jnp.sum(jnp.sin(f(a))))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), mine(at), wanted(at))
        assert "scatter" not in str(jax.make_jaxpr(mine)(at))
        twice = [jax.grad(lambda a, f=f: jnp.sum(jnp.sin(f(a)[1])))(at) for f in (mine, wanted)]
        np.testing.assert_allclose(*twice, rtol=1e-5, atol=1e-6)


def test_blocks_never_have_more_rows_than_half_a_fair_share():
    sizes = {(1, 8): 1, (2, 8): 1, (64, 8): 4, (1024, 8): 64, (4096, 16): 128, (10**6, 2): 128}
    assert {picks: grouped_product.block_size(*picks) for picks in sizes} == sizes


def test_both_ways_to_multiply_runs_agree_in_values_and_gradients():
    def pulled(product):
        def both(x, w, sizes, c):
            y, pull = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
            return y, *pull(c)

        return jax.jit(both)

    with jax.enable_x64(True):
        shapes = zip(jax.random.split(jax.random.key(4), 3), ((32, 6), (4, 6, 5), (32, 5)), strict=True)
        x, w, c = (jax.random.normal(k, shape, jnp.float64) for k, shape in shapes)
        ragged = pulled(grouped_product.ragged_product)
        blocked = pulled(functools.partial(grouped_product.blocked_product, block=4))
        chosen = pulled(lambda *a: grouped_product.grouped_product(*a, 4))
        turned = [pulled(functools.partial(product, transposed=True)) for product in (
            grouped_product.ragged_product, functools.partial(grouped_product.blocked_product, block=4))]
        turned.append(pulled(lambda *a: grouped_product.grouped_product(*a, 4, True)))
        for sizes in ((4, 0, 12, 8), (0, 0, 0, 0), (0, 24, 0, 0), (8, 8, 8, 8)):
            args = x, w, jnp.asarray(sizes, jnp.int32), c
            wanted, ends = np.zeros((32, 5)), np.cumsum(sizes)
            for i, end in enumerate(ends):
                wanted[end - sizes[i] : end] = np.asarray(x)[end - sizes[i] : end] @ np.asarray(w)[i]
            results = ragged(*args), blocked(*args), chosen(*args)
            np.testing.assert_allclose(results[0][0], wanted, atol=1e-12)
            close(results[0], results[1], atol=1e-12)
            close(results[1], results[2], atol=1e-12)
            for product in turned:
                y, dx, dw = product(x, jnp.swapaxes(w, 1, 2), *args[2:])
                close((y, dx, jnp.swapaxes(dw, 1, 2)), results[0], atol=1e-12)


def test_rows_without_a_pick_are_never_read():
    """A kernel leaves there what it finds. Of bfloat16 rows the sum is rounded once."""
    picks = np.random.default_rng(1).integers(0, 4, (6, 2)).astype(np.int32)  # 3 experts, and none
    made = dispatch(jnp.asarray(picks.reshape(-1)), 3, 4)
    rows = made.row.reshape(6, 2)
    read = np.isin(np.arange(made.pick.size), rows)
    assert not read.all() and (picks == 3).any()
    y = jax.random.normal(jax.random.key(3), (made.pick.size, 5)).astype(jnp.bfloat16)
    found = grouped_product.collect(jnp.where(read[:, None], y, jnp.nan), made.pick // 2, rows)
    wanted = np.zeros((6, 5))
    for n, k in zip(*np.nonzero(np.asarray(rows) < made.pick.size), strict=True):
        wanted[n] += np.asarray(y[rows[n, k]], np.float64)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2.0**-8, atol=1e-6)


def test_the_tpus_tiles_give_the_same_values_and_gradients_wherever_a_run_begins():
    """After the last run they leave what they find."""
    shapes = zip(jax.random.split(jax.random.key(5), 3), ((512, 128), (3, 128, 256), (512, 256)), strict=True)
    x, w, c = (jax.random.normal(k, shape) for k, shape in shapes)
    sizes = jnp.asarray((71, 0, 314), jnp.int32)
    wanted, pull = jax.vjp(lambda x, w: grouped_product.ragged_product(x, w, sizes), x, w)
    left = jnp.where(jnp.arange(512)[:, None] < 385, x, jnp.nan), jnp.where(jnp.arange(512)[:, None] < 385, c, jnp.nan)
    dx_wanted, dw_wanted = pull(c)
    for transposed in (False, True):
        how = {"transposed": transposed, "interpret": True}
        matrices = jnp.swapaxes(w, 1, 2) if transposed else w
        y = grouped_product.tiled_product(left[0], matrices, sizes, **how)
        dx, dw = grouped_product.tiled_gradients(left[0], matrices, sizes, left[1], **how)
        dw = jnp.swapaxes(dw, 1, 2) if transposed else dw
        close((y[:385], dx[:385], dw), (wanted[:385], dx_wanted[:385], dw_wanted), atol=1e-4)
    assert grouped_product.takes_tiles(512, 128, 256) and not grouped_product.takes_tiles(512, 16, 8)
    assert grouped_product.row_count(100, 4, 8) == 128 and grouped_product.row_count(5000, 20, 64) % 512 == 0


def test_the_platform_of_the_lowering_chooses_how_runs_are_multiplied():
    x, real = inputs()
    for platform, ragged in (("cpu", False), ("tpu", True), ("cuda", False)):
        text = step(HALF).trace(params(HALF), x, real).lower(lowering_platforms=(platform,)).as_text()
        assert ("ragged_dot" in text) == ragged


def test_a_cpu_spends_what_the_picks_need_not_what_all_experts_would():
    tokens, d, f, e, k = 512, 64, 32, 8, 2
    shapes = ((1, tokens, d), (1, tokens, k), (1, tokens, k), (e, d, f), (e, d, f), (e, f, d))
    x, experts, weights, *matrices = (
        jax.ShapeDtypeStruct(s, jnp.int32 if i == 1 else jnp.float32) for i, s in enumerate(shapes)
    )
    step = lambda x, experts, weights, *w: jnp.sum(  # noqa: E731
        moe.mix_experts(x, moe.Routing(experts, weights), w[:2], w[2]))  # fmt: skip
    compiled = jax.jit(jax.grad(step, argnums=(0, 3, 4, 5))).lower(x, experts, weights, *matrices).compile()
    needed = 3 * 6 * tokens * k * d * f  # forward, and twice that backward
    assert compiled.cost_analysis()["flops"] < 1.6 * needed


def test_a_tpu_writes_rows_of_picks_alone_and_none_of_the_models_width_in_float32():
    """At 4,096 tokens of two picks: 8,192 rows, however many experts; what is weighed are hidden units. Gate and up are
    one matrix: the rows are read once, and come back as one gradient."""
    shapes = ((1, 4096, 2048), (16, 2048, 1024), (16, 512, 2048))
    x, *matrices = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    picked = [jax.ShapeDtypeStruct((1, 4096, 2), kind) for kind in (jnp.int32, jnp.float32)]

    def loss(x, weights, matrices, experts):
        return jnp.sum(moe.mix_experts(x, moe.Routing(experts, weights), matrices[:1], matrices[1]).astype(jnp.float32))

    device = jax.sharding.AbstractDevice("TPU v5", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        program = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, picked[1], matrices, picked[0]))
    assert program.count("name=gmm") == 4 and program.count("name=tgmm") == 2 and "ragged_dot" not in program
    assert "bf16[8192,2048]" in program and "f32[8192,512]" in program and "f32[8192,2048]" not in program
