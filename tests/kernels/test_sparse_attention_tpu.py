"""The TPU kernels of sparse attention through Pallas' interpreter, against the dense definition.

Tiles of 128 queries and 128 keys, bands of 256 keys, and rows of 230 tokens: two tiles of both, the last one cut.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_attention import pallas_tpu
from pallas_kernels.sparse_attention.api import Indexer, Positions, sparse_attention
from pallas_kernels.sparse_attention.tpu import layout as layout
from pallas_kernels.sparse_attention.tpu.standalone import kernels
from tests.kernels.test_sparse_attention import (
    CASES,
    DENSE,
    NAMES,
    OPTIONS,
    assert_split_heads_equal_the_whole,
    cotangents,
    draw,
    packed,
    relative_error,
    run,
    selected_keys,
)
from tests.rarely import rarely

TILES = (128, 128, 256)
KERNELS = functools.partial(pallas_tpu.sparse_attention, interpret=True, tiles=TILES)
ROWS = (40, 130, 0, 60), (230,)


def both(x, positions, dtype, attend=KERNELS, **options):
    """Results by name of the kernels in the dtype, and of the dense definition in float32 for the same values."""
    options = tuple({**OPTIONS, **options}.items())
    narrow = [jnp.asarray(a, dtype if j < 5 else jnp.float32) for j, a in enumerate(x)]
    incoming = [jnp.asarray(d, jnp.float32) for d in cotangents(x)]
    wide = [a.astype(jnp.float32) for a in narrow]
    got = run(narrow, positions, *incoming, attend=attend, options=options)
    wanted = run(wide, positions, *incoming, attend=DENSE, options=options)
    named = lambda values: dict(zip(NAMES, (np.asarray(a, np.float64) for a in values), strict=True))  # noqa: E731
    return named(got), named(wanted)


def assert_close(got, wanted, limit):
    np.testing.assert_array_equal(got["selected"], wanted["selected"])
    errors = {name: relative_error(got[name], wanted[name]) for name in NAMES}
    assert max(errors.values()) < limit, errors


BFLOAT16 = rarely("bfloat16", 0.008)  # of the suite's: the test for races


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2e-6), BFLOAT16])
def test_values_statistics_and_gradients_of_packed_documents(dtype, limit):
    """Adaptive budgets, sinks, segments that cross tiles, padding; in bfloat16 budgets that do not hang on rounding."""
    positions = packed(*ROWS)
    fixed = {"k_min": 6, "k_max": 6} if dtype == "bfloat16" else {}
    got, wanted = both(draw(positions), positions, dtype, **fixed)
    assert fixed or len(np.unique(wanted["selected"])) > 10
    assert_close(got, wanted, limit)


# without ties the test before compares what is selected
@pytest.mark.parametrize("tied", [True, rarely(False)])
def test_exactly_the_keys_of_the_dense_definition_are_selected(tied):
    """Ties end inside tiles where scores are few; then the smaller index wins."""
    positions = packed(*ROWS)
    x = [jnp.asarray(a, jnp.float32) for a in draw(positions, seed=4)]
    if tied:
        x[3:5] = [jnp.round(a) for a in x[3:5]]
        x[5:] = [jnp.full_like(a, 0.5) for a in x[5:]]
    (got, count), (wanted, _) = (selected_keys(x, positions, attend, 2) for attend in (KERNELS, DENSE))
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(np.asarray(got).sum(-1).mean(-1), count)


def test_neither_races_nor_reads_what_nobody_wrote():
    """Memory poisoned, copies as late as allowed; two bands, and a key tile that no later query selects from."""
    positions = packed((400,))
    x = draw(positions, h=2, n=2)
    x[3], x[4] = np.abs(x[3]), np.abs(x[4])
    x[4][:, 128:256] *= -1
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait", random_seed=1
    )
    attend = functools.partial(pallas_tpu.sparse_attention, interpret=params, tiles=(128, 128, 256), chunk=64)
    got, wanted = both(x, positions, "bfloat16", attend, k_min=6, k_max=6)
    jax.block_until_ready(got)
    assert_close(got, wanted, 0.008)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


@pytest.mark.exhaustive
def test_a_cache_a_head_an_indexer_head_and_row_variance():
    positions, sizes, options = CASES["a cache, a head an indexer head, row variance"]
    got, wanted = both(draw(positions, **sizes), positions, "float32", **options)
    assert_close(got, wanted, 2e-6)


@pytest.mark.exhaustive
def test_heads_split_over_devices_equal_the_whole():
    assert_split_heads_equal_the_whole(KERNELS, DENSE, packed(*ROWS), OPTIONS)


def test_tiles_without_survivors_are_left_out():
    """The table names for each tile the one that is held, and what is to be done; a band's tiles lie within it."""
    flags = jnp.asarray([[[0, 1, 0, 2], [0, 0, 0, 0], [2, 0, 0, 0]]])
    table = np.asarray(layout.lay_table(flags))
    np.testing.assert_array_equal(table & 3, flags)
    np.testing.assert_array_equal(table >> 2, [[[1, 1, 1, 3], [3, 3, 3, 3], [0, 0, 0, 0]]])


def test_what_the_kernels_do_not_do_is_said():
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))  # noqa: E731
    t, place = 1 << 18, of("int32", 1, 1 << 18)
    index, wide = of("bfloat16", 1, t, 4, 64), functools.partial(of, "float32")
    indexer = Indexer(index, index, wide(1, t, 4), wide(4), wide(4), wide())
    attend = functools.partial(sparse_attention, k_base=4, k_min=1, k_max=8, implementation="pallas_tpu")
    with pytest.raises(ValueError) as error:
        jax.eval_shape(attend, *[of("float16", 1, t, 4, 64)] * 3, indexer, Positions(*[place] * 4))
    for part in ("'pallas_tpu' needs a TPU, this is for cpu", "q must be float32 or bfloat16, got float16",
                 "the blocks of select take"):  # fmt: skip
        assert part in str(error.value)


def test_the_published_sizes_fit():
    """`8b`: 16 heads of 256, 4 indexer heads of 32; and 32,768 tokens of 16 heads of 128."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    for length, width, batch in ((4096, 256, 8), (32768, 128, 1)):
        q, index = of(batch, length, 16, width), of(batch, length, 4, 32)
        assert pallas_tpu.unsupported(q, q, q, Indexer(index, index, *[index] * 4)) == []


def test_costs_are_those_of_the_shapes():
    """Pairs of tiles of a causal row; each token is moved at least once, each band's queries each time."""
    sizes = {"heads": 16, "width": 128, "indexer_heads": 4, "indexer_width": 32}
    short, long = ({x.name.split("_")[-1]: x for x in kernels(1, t, **sizes)} for t in (1024, 2048))
    tile = short["attend"].plan.query_tile
    assert short["attend"].tiles == 4 * 5 // 2 and tile == 256
    assert short["attend"].flops == 10 * tile**2 * (2 * 2 * 16 * 128 + 2 * 4 * 128)
    for name, kernel in long.items():
        assert kernel.least_bytes == 2 * short[name].least_bytes
        assert kernel.least_bytes <= kernel.moved_bytes
    assert long["backward"].calls == 4 and long["backward"].steps == 20 and long["attend"].tiles == 36


def test_the_compiler_is_told_what_a_kernel_costs():
    """All calls of a kernel together are told to do what is counted for it."""
    for kernel in kernels(1, 1024, heads=4, width=128, indexer_heads=2, indexer_width=32):
        jaxpr = jax.make_jaxpr(kernel.run)(*kernel.arguments)
        (call,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call")
        told = call.params["cost_estimate"]
        assert (told.flops * kernel.calls, told.bytes_accessed * kernel.calls) == (kernel.flops, kernel.moved_bytes)
        assert told.transcendentals >= 0 and told.flops > 0
