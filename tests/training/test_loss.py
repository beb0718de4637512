"""Cross-entropy in pieces: values and gradients of the dense definition, on one device and cut over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.devices.pods import hlo
from gt_jax.devices.pods.program_flops import count_flops, flops_of
from gt_jax.devices.sharding import Rules, make_mesh, reshard
from gt_jax.training.loss import cross_entropy, loss_if, piece_tokens, token_losses, unembedded_cross_entropy

B, T, D, V = 4, 7, 8, 24
RULES = Rules()


def material(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    matrix = jax.random.normal(keys[0], (D, V), dtype)
    hidden = jax.random.normal(keys[1], (B, T, D), dtype)
    return matrix, hidden, jax.random.randint(keys[2], (B, T), -1, V)


def dense(matrix, hidden, targets):
    logits = jnp.einsum("btd,dv->btv", hidden, matrix, preferred_element_type=jnp.float32)
    return cross_entropy(logits, targets)


def pieces(matrix, hidden, targets, *, tied=False, piece=None):
    matrix = reshard(matrix, RULES.spec("embed", None if tied else "vocab"))
    hidden, targets = reshard(hidden, RULES.spec("batch", None, None)), reshard(targets, RULES.spec("batch", None))
    compute = matrix.dtype.name
    return unembedded_cross_entropy(matrix, hidden, targets, rules=RULES, compute=compute, tied=tied, piece=piece)


@functools.partial(jax.jit, static_argnums=0)
def both(loss, matrix, hidden, targets):
    """(3 times the loss, count, gradients by matrix and hidden)."""
    scaled = lambda *x: (lambda total, count: (3 * total, count))(*loss(*x, targets))  # noqa: E731
    value, gradients = jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(matrix, hidden)
    return *value, *gradients


def assert_same(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, atol=tolerance * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize("piece", [None, 1, 3, 7])
def test_pieces_of_any_length_give_the_dense_loss_and_its_gradients(piece):
    x = material()
    assert_same(both(functools.partial(pieces, piece=piece), *x), both(dense, *x), 1e-6)


@pytest.mark.parametrize("cut", [False, True])
def test_losses_by_token_are_those_of_the_dense_definition(cut):
    matrix, hidden, targets = material()
    logits = np.einsum("btd,dv->btv", *(np.asarray(x, np.float64) for x in (hidden, matrix)))
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    wanted = -np.take_along_axis(log_p, np.maximum(np.asarray(targets), 0)[..., None], axis=-1)[..., 0]
    wanted = np.where(np.asarray(targets) >= 0, wanted, 0.0)
    mesh = make_mesh(data=2, fsdp=2, tensor=2) if cut else make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        placed = [reshard(x, RULES.spec(*axes)) for x, axes in (
            (matrix, ("embed", "vocab")), (hidden, ("batch", None, None)), (targets, ("batch", None)))]  # fmt: skip
        found = jax.jit(functools.partial(token_losses, rules=RULES, compute="float32", piece=3))(*placed)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_cut_over_rows_width_and_vocabulary_the_loss_is_the_same(tied):
    x = material()
    wanted = both(dense, *x)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        found = both(functools.partial(pieces, tied=tied, piece=2), *x)
        stored = jax.sharding.NamedSharding(jax.sharding.get_mesh(), RULES.spec("embed", None if tied else "vocab"))
        assert found[2].sharding.is_equivalent_to(stored, 2)
    assert_same(found, wanted, 1e-6)


def test_a_loss_that_nobody_asks_for_is_not_run():
    """It is one branch of a conditional, over a mesh too; where it is asked for it is the same."""
    x = material()
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        either = jax.jit(lambda asked, *x: loss_if(asked, lambda: pieces(*x)))
        compiled = either.lower(jnp.asarray(True), *x).compile()
        found, nothing = compiled(jnp.asarray(True), *x), compiled(jnp.asarray(False), *x)
    assert_same(found, dense(*x), 1e-6)
    assert [float(one) for one in nothing] == [0.0, 0.0]
    program = hlo.read(compiled.as_text())
    branches = [x for name in program.times for x in program.computations[name] if x.opcode == "conditional"]
    assert len(branches) == 1 and count_flops(program).flops > 0
    inside = program.shares(flops_of, lambda here, x: here.name, through=("fusion",))
    assert program.entry not in inside


def test_where_a_mesh_leaves_the_vocabulary_whole_pieces_are_four_times_as_long():
    """The gradient of the matrix, [d, v] float32, is read and written once a piece."""
    assert piece_tokens(2, 1 << 17, 1) == (1 << 26) // (2 << 17) == 256
    with jax.set_mesh(make_mesh(fsdp=8)):
        assert piece_tokens(2, 1 << 17, 1) == 1024 and piece_tokens(2, 1 << 17, 4) == 1024
    assert piece_tokens(1 << 30, 1 << 17, 1) == 1


def test_weights_in_bfloat16_collect_their_gradient_in_float32():
    x = material(jnp.bfloat16)
    found = both(functools.partial(pieces, piece=1), *x)
    assert found[2].dtype == found[3].dtype == jnp.bfloat16
    assert_same(found, both(dense, *[a.astype(jnp.float32) for a in x[:2]], x[2]), 2**-8)


def test_nothing_holds_all_logits():
    """The largest array of the program is a piece's logits or the gradient of the matrix."""
    shapes = [(64, 1024), (4, 256, 64), (4, 256)]
    structs = [jax.ShapeDtypeStruct(s, jnp.int32 if len(s) == 2 and s[0] == 4 else jnp.float32) for s in shapes]
    compiled = both.lower(functools.partial(pieces, piece=16), *structs).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < 4 * 256 * 1024 * 4 < both.lower(dense, *structs).compile().memory_analysis().temp_size_in_bytes
