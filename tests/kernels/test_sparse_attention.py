"""The tiled sparse attention against the dense definition, and both against the equations row by row in float64.

Tiles of 8 queries and 16 keys, so that every case has several of both, whole and cut.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.sparse_attention import api, reference, xla
from pallas_kernels.sparse_attention.api import Indexer, Positions, sparse_attention

TILED = functools.partial(xla.sparse_attention, query_tile=8, key_tile=16)
STRIPS = functools.partial(xla.sparse_attention, query_tile=16, together=True)  # as for a GPU
DENSE = reference.sparse_attention
OPTIONS = {"k_base": 6, "k_min": 3, "k_max": 9, "sinks": 2}
EMA = 0.01  # about the variance of the scores times the squared importance: budgets lie between their bounds
PACKED = (1, 2, 17, 0, 15), (35,)


def packed(*rows):
    """Positions of rows of packed documents of these lengths."""
    segment = np.stack([np.repeat(np.arange(len(lengths)) + 1, lengths) for lengths in rows]).astype(np.int32)
    position = np.broadcast_to(np.arange(segment.shape[1], dtype=np.int32), segment.shape)
    return Positions(*map(jnp.asarray, (position, segment, position, segment)))


def cached(rows=2, tokens=5, room=40):
    """Queries after 20 tokens with a cache that has room for more; row 1's last query belongs to nothing."""
    position = np.broadcast_to(20 + np.arange(tokens, dtype=np.int32), (rows, tokens))
    segment = np.ones((rows, tokens), np.int32)
    segment[1, -1] = 7
    place = np.broadcast_to(np.arange(room, dtype=np.int32), (rows, room))
    written = np.where(place < 20 + tokens, 1, -1).astype(np.int32)
    return Positions(*map(jnp.asarray, (position, segment, place, written)))


def draw(positions, h=4, n=2, k=6, v=5, i=4, seed=0):
    """Float64 (q, k, v, indexer query, key, weight, bias, importance)."""
    r, (b, t), s = np.random.default_rng(seed), positions.query.shape, positions.key.shape[1]
    tokens = [r.normal(size=(b, length, *rest)) for length, *rest in ((t, h, k), (s, h, k), (s, h, v))]
    index = [r.normal(size=(b, t, n, i)), r.normal(size=(b, s, n, i)), 1 / (1 + np.exp(-r.normal(size=(b, t, n))))]
    return [*tokens, *index, r.normal(size=n), r.normal(size=h)]


def cotangents(x, seed=9):
    r = np.random.default_rng(seed)
    return r.normal(size=(*x[0].shape[:3], x[2].shape[-1])), r.normal(size=x[0].shape[:2])


@functools.partial(jax.jit, static_argnames=("attend", "options"))
def run(x, positions, d_o, d_kl, attend, options):
    """(o, statistics) and the gradients of all eight float arguments, of the output and the KL."""

    def loss(*x):
        o, seen = attend(*x[:3], Indexer(*x[3:], jnp.asarray(EMA, jnp.float32)), positions, **dict(options))
        total = jnp.sum(o.astype(jnp.float32 if d_o.dtype == jnp.bfloat16 else d_o.dtype) * d_o)
        # the other statistics have no gradient: if one had, the sum would show it
        return total + jnp.sum(seen.kl * d_kl) + jnp.sum(seen.entropy + seen.score_variance), (o, seen)

    gradients, results = jax.grad(loss, argnums=range(8), has_aux=True)(*x)
    return (*results[:1], *results[1], *gradients)


NAMES = (
    "o", "kl", "entropy", "selected", "score_variance",
    "dq", "dk", "dv", "dindex_query", "dindex_key", "dweight", "dbias", "dimportance",
)  # fmt: skip


def both(x, positions, dtype=np.float64, attend=TILED, **options):
    """Results by name of `attend` in the dtype, and of the dense definition in float64 for the same values."""
    options, least = tuple({**OPTIONS, **options}.items()), np.promote_types(dtype, np.float32)
    x = [a.astype(dtype if j < 5 else least) for j, a in enumerate(x)]
    incoming = [d.astype(least) for d in cotangents(x)]
    with jax.enable_x64(True):
        wide = [[a.astype(np.float64) for a in arrays] for arrays in (x, incoming)]
        wanted = run(wide[0], positions, *wide[1], attend=DENSE, options=options)
    with jax.enable_x64(dtype == np.float64):
        got = run(x, positions, *incoming, attend=attend, options=options)
    named = lambda values: dict(zip(NAMES, (np.asarray(a, np.float64) for a in values), strict=True))  # noqa: E731
    return named(got), named(wanted)


def relative_error(value, truth):
    return np.sqrt(np.mean((value - truth) ** 2)) / max(np.sqrt(np.mean(truth**2)), 1e-300)


CASES = {
    "packed documents": (packed(*PACKED), {}, {}),
    "a cache, a head an indexer head, row variance": (cached(), {"h": 2}, {"sinks": 0, "variance": "row"}),
}


@pytest.mark.parametrize(("case", "attend"), [(case, attend) for case in CASES for attend in (TILED, STRIPS)])
def test_float64_values_and_gradients_equal_autodiff_of_the_dense_definition(case, attend):
    positions, sizes, options = CASES[case]
    got, wanted = both(draw(positions, **sizes), positions, attend=attend, **options)
    np.testing.assert_array_equal(got["selected"], wanted["selected"])
    assert len(np.unique(got["selected"])) > 3  # budgets differ, or the case would say little
    for name in NAMES:
        assert np.abs(wanted[name]).max() > 0, name
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-5), (jnp.bfloat16, 0.008)])
def test_narrow_inputs_stay_near_float64(dtype, limit):
    positions = packed((40,), (40,))
    got, wanted = both(draw(positions), positions, dtype, k_min=6, k_max=6)
    np.testing.assert_array_equal(got["selected"], wanted["selected"])
    errors = {name: relative_error(got[name], wanted[name]) for name in NAMES}
    assert max(errors.values()) < limit, errors


def by_the_equations(x, positions, k_base, k_min, k_max, sinks, variance="visible"):
    """(o, kl, entropy, selected, score_variance), a row at a time: REFERENCE, section 3."""
    q, k, v, index_q, index_k, weight, bias, importance = x
    positions = Positions(*map(np.asarray, positions))
    sigmoid = lambda y: 1 / (1 + np.exp(-y))  # noqa: E731
    (b, t, h, width), n, s = q.shape, index_q.shape[2], k.shape[1]
    o, seen = np.zeros((b, t, h, v.shape[-1])), np.zeros((4, b, t))
    for row, token in np.ndindex(b, t):
        place, segment = positions.query[row, token], positions.query_segment[row, token]
        keys = np.flatnonzero((positions.key[row] <= place) & (positions.key_segment[row] == segment))
        if not len(keys):
            continue
        target, mass = np.zeros(s), np.zeros(s)
        for head in range(h):
            j = head * n // h
            logits = index_k[row, keys, j] @ index_q[row, token, j] * index_q.shape[-1] ** -0.5 + bias[j]
            scores = weight[row, token, j] * sigmoid(logits)
            filled = np.zeros(positions.query[row].max() + 1) if variance == "row" else np.zeros(len(keys))
            filled[: len(keys)] = scores
            spread = filled.var() * sigmoid(importance[head]) ** 2
            budget = min(int(np.floor(np.clip(k_base * spread / np.float32(EMA), k_min, k_max))), len(keys))
            order = sorted(range(len(keys)), key=lambda m: (m >= sinks, 0 if m < sinks else -scores[m], m))
            kept = np.sort(order[:budget])
            attention = np.exp(k[row, keys[kept], head] @ q[row, token, head] * width**-0.5)
            attention /= attention.sum()
            o[row, token, head] = attention @ v[row, keys[kept], head]
            target[keys[kept]] += attention / h
            mass[keys[kept]] += sigmoid(importance[head]) * scores[kept]
            entropy = -np.sum(attention * np.log(attention)) / np.log(np.float32(max(len(keys), 2)))
            seen[1:, row, token] += np.array([entropy, budget, spread]) / h
        held = target > 0
        seen[0, row, token] = np.sum(target[held] * np.log(target[held] / mass[held] * mass.sum()))
    return o, *seen


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attend", [DENSE, TILED])
def test_float64_agrees_with_the_equations_row_by_row(case, attend):
    positions, sizes, options = CASES[case]
    x = draw(positions, **sizes)
    with jax.enable_x64(True):
        got = run(x, positions, *cotangents(x), attend=attend, options=tuple({**OPTIONS, **options}.items()))
    wanted = by_the_equations(x, positions, **{**OPTIONS, **options})
    for name, a, b in zip(NAMES[:5], got[:5], wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9, err_msg=name)


@functools.partial(jax.jit, static_argnames=("attend", "sinks"))
def selected_keys(x, positions, attend, sinks):
    """[b, t, h, s]: with one-hot values and queries of 0, the output is positive exactly where a key is selected."""
    (b, s, h, _), wide = x[1].shape, jnp.zeros_like(x[0])
    v = jnp.broadcast_to(jnp.eye(s, dtype=wide.dtype)[None, :, None], (b, s, h, s))
    indexer = Indexer(*x[3:], jnp.asarray(EMA, jnp.float32))
    o, seen = attend(wide, x[1], v, indexer, positions, **(OPTIONS | {"sinks": sinks}))
    return o > 0, seen.selected


@pytest.mark.parametrize("tied", [True, False])
def test_exactly_the_keys_of_the_dense_definition_are_selected(tied):
    positions = packed(*PACKED)
    x = [jnp.asarray(a, jnp.float32) for a in draw(positions, seed=4)]
    if tied:  # few distinct scores, exact in every order of summation: the index decides
        x[3:5] = [jnp.round(a) for a in x[3:5]]
        x[5:] = [jnp.full_like(a, 0.5) for a in x[5:]]
    (got, count), (wanted, _), (strips, _) = (selected_keys(x, positions, attend, 2)
                                              for attend in (TILED, DENSE, STRIPS))  # fmt: skip
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(strips, wanted)
    np.testing.assert_array_equal(np.asarray(got).sum(-1).mean(-1), count)
    of_indexer = np.asarray(got).reshape(*got.shape[:2], 2, 2, -1)
    assert tied or np.any(of_indexer[:, :, :, 0] != of_indexer[:, :, :, 1])  # each head has its own budget


def test_no_output_depends_on_a_later_token_or_another_document():
    positions, token = packed((20, 20)), 29
    x = [jnp.asarray(a, jnp.float32) for a in draw(positions)]

    def outputs(*x):
        o, seen = TILED(*x[:3], Indexer(*x[3:], jnp.asarray(EMA, jnp.float32)), positions, **OPTIONS)
        return o[0, token].sum() + seen.kl[0, token], (o, seen.kl)

    reach = jax.jit(jax.grad(outputs, argnums=range(6), has_aux=True))
    gradient, (o, kl) = reach(*x)
    for name, d in zip(NAMES[5:], gradient, strict=False):
        size = np.abs(np.asarray(d))[0].reshape(40, -1).sum(-1)
        assert np.all(size[token + 1 :] == 0) and np.all(size[:20] == 0), name
        assert size[20 : token + 1].max() > 0, name
    # the selection has no gradient, so by value too
    changed = [a.at[:, token + 1 :].set(2.0).at[:, :20].set(-3.0) for a in x[:6]]
    _, (later, later_kl) = reach(*changed, *x[6:])
    np.testing.assert_array_equal(later[:, 20 : token + 1], o[:, 20 : token + 1])
    np.testing.assert_array_equal(later_kl[:, 20 : token + 1], kl[:, 20 : token + 1])


def test_heads_split_over_devices_equal_the_whole():
    assert_split_heads_equal_the_whole(TILED, TILED, packed(*PACKED), OPTIONS | {"variance": "row"})


def assert_split_heads_equal_the_whole(attend, against, positions, options):
    """Half the heads on each of two devices: outputs, statistics and gradients of `against` on one."""
    x = [jnp.asarray(a, jnp.float32) for a in draw(positions)]
    d_o, d_kl = (jnp.asarray(d, jnp.float32) for d in cotangents(x))
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    of_heads, per_head = P(None, None, "tensor"), P("tensor")

    def local(*x):
        indexer = Indexer(*x[3:], jnp.asarray(EMA, jnp.float32))
        return attend(*x[:3], indexer, positions, **options, head_axes=("tensor",))

    specs = tuple([of_heads] * 6 + [per_head] * 2), (of_heads, reference.Statistics(*[P()] * 4))
    split = jax.shard_map(local, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)

    def loss(*x):
        o, seen = split(*x)
        return jnp.sum(o * d_o) + jnp.sum(seen.kl * d_kl), (o, seen)

    gradients, (o, seen) = jax.jit(jax.grad(loss, argnums=range(8), has_aux=True))(*x)
    wanted = run(x, positions, d_o, d_kl, attend=against, options=tuple(options.items()))
    for name, a, b in zip(NAMES, (o, *seen, *gradients), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=name)


def temporaries(t, h=16, n=4):
    """Bytes that forward and backward need beside arguments and results: bfloat16, 16 heads of 128, one row."""
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    narrow, wide, place = functools.partial(of, jnp.bfloat16), functools.partial(of, jnp.float32), of(jnp.int32, 1, t)
    index = [narrow(1, t, n, 64), narrow(1, t, n, 64), wide(1, t, n), wide(n), wide(h), wide()]
    attend = functools.partial(sparse_attention, k_base=512, k_min=32, k_max=1024, implementation="xla")

    def loss(q, k, v, indexer, positions):
        o, seen = attend(q, k, v, indexer, positions)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(seen.kl)

    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    arguments = *[narrow(1, t, h, 128)] * 3, Indexer(*index), Positions(*[place] * 4)
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_memory_stays_below_a_gibibyte_at_32768_tokens_and_is_linear():
    short, medium, long = (temporaries(t) for t in (2048, 4096, 32768))
    assert long < 2**30
    assert medium < 2.3 * short and long < 8.3 * medium


def test_long_rows_take_tiles_and_a_single_token_does_not(monkeypatch):
    taken = []

    def spy(name, run):
        return lambda *args, **options: (taken.append(name), run(*args, **options))[1]

    for name, implementation in api.IMPLEMENTATIONS.items():
        monkeypatch.setitem(api.IMPLEMENTATIONS, name, spy(name, implementation))
    for positions in (packed((16,)), packed((api.TILED_FROM,)), cached(rows=2, tokens=1, room=api.TILED_FROM)):
        x = [jnp.asarray(a, jnp.float32) for a in draw(positions)]
        attend = functools.partial(sparse_attention, positions=positions, **OPTIONS)
        jax.eval_shape(attend, *x[:3], Indexer(*x[3:], jnp.zeros(())))
    assert taken == ["reference", "xla", "reference"]


def test_every_argument_that_does_not_fit_is_named():
    positions = packed((16,))
    x = [jnp.asarray(a, jnp.float32) for a in draw(positions)]
    indexer = Indexer(*x[3:5], x[5][:, 1:], x[6], x[7][:3], jnp.zeros(()))
    wrong = positions._replace(key=positions.key[:, 1:])
    with pytest.raises(ValueError) as error:
        sparse_attention(*x[:3], indexer, wrong, k_base=0, k_min=7, k_max=3, sinks=-1, implementation="fast",
                         variance="both")  # fmt: skip
    for part in (
        "implementation 'fast' is not one of reference, xla", "indexer.weight must be [b, t, n] = (1, 16, 2)",
        "indexer.importance must be [h] = (4,)", "positions.key must be [b, s] = (1, 16)", "k_min 7", "sinks -1",
        "k_base 0 must be at least 1", "variance 'both' is not one of visible, row",
    ):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(ValueError, match="3 heads are no multiple of 2 indexer heads"):
        sparse_attention(*(a[:, :, :3] for a in x[:3]), Indexer(*x[3:7], x[7][:3], jnp.zeros(())), positions, **OPTIONS)
