"""Cross-entropy of the next token, from logits or straight from the state before the unembedding.

The second way holds the logits of one piece of the sequence at a time, [rows, piece, vocab / shards], whatever the
vocabulary. Loss and gradient of a piece come from the same logits, so none are computed twice:

    z = h W      loss = sum over targets y of logsumexp(z) - z_y      dz = softmax(z) - onehot(y)      dh = dz W^T
    dW = sum over pieces of h^T dz, in float32, summed over the devices once at the end
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gt_jax.devices.sharding import Rules, has_mesh, per_device, reshard
from gt_jax.typing import Activations, Scalar

LOGITS = 1 << 26  # of a piece on one device: 256 MiB in float32
WHOLE_LOGITS = 1 << 28  # where a mesh leaves the vocabulary whole: a piece reads and writes all of dW, [d, v] float32


def cross_entropy(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> tuple[Scalar, Scalar]:
    """(sum of -log softmax(logits)[target], number of targets) over the positions with a target >= 0, float32 nats."""
    logits = logits.astype(jnp.float32)
    # a one-hot sum, not a gather: it keeps a vocabulary axis sharded
    vocabulary = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]
    hit = vocabulary == targets[..., None]
    chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    counted = targets >= 0
    loss = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)
    return jnp.sum(loss), jnp.sum(counted, dtype=jnp.float32)


class _Plan(NamedTuple):
    """What is known when compiling: `tied` matrices are not cut along the vocabulary."""

    rules: Rules
    compute: str
    tied: bool
    piece: int

    @property
    def vocab(self) -> str | None:
        return None if self.tied else "vocab"

    def axes(self, axis: str | None) -> tuple[str, ...]:
        return self.rules.mesh_axes(axis) if axis is not None and has_mesh() else ()


def unembedded_cross_entropy(
    matrix: Float[Array, "d v"], hidden: Activations, targets: Int[Array, "b t"], *, rules: Rules, compute: str,
    tied: bool = False, piece: int | None = None,
) -> tuple[Scalar, Scalar]:
    """`cross_entropy(hidden matrix, targets)`, in pieces of the sequence, without ever holding all logits.

    Args:
        matrix: the unembedding as it is stored, cut over "embed" and (unless `tied`) "vocab".
        hidden: the state after the final norm.
        rules: where arrays live on the mesh.
        compute: the dtype of the products; sums, softmax and loss are float32.
        piece: tokens of a row at a time; None takes as many as hold `LOGITS` logits a device, or `WHOLE_LOGITS`.
    """
    return _loss(_plan(matrix, hidden, rules, compute, tied, piece), matrix, hidden, targets)


def token_losses(
    matrix: Float[Array, "d v"], hidden: Activations, targets: Int[Array, "b t"], *, rules: Rules, compute: str,
    tied: bool = False, piece: int | None = None,
) -> Float[Array, "b t"]:
    """-log softmax(hidden matrix)[target] of each token, float32 nats, 0 where the target is -1; no gradient.

    The arguments, and what is held, are those of `unembedded_cross_entropy`, whose loss is the sum of these.
    """
    plan = _plan(matrix, hidden, rules, compute, tied, piece)

    def local(matrix: Array, hidden: Array, targets: Array) -> Array:
        weight, first = _weight(plan, matrix)

        def step(carry: None, piece: tuple[Array, Array]) -> tuple[None, Array]:
            return None, _piece(piece[0].astype(weight.dtype), weight, piece[1], first, plan.axes(plan.vocab))[0]

        _, found = jax.lax.scan(step, None, (_pieces(hidden, plan.piece, 0), _pieces(targets, plan.piece, -1)))
        return jnp.moveaxis(found, 0, 1).reshape(hidden.shape[0], -1)[:, : hidden.shape[1]]

    stored, tokens = rules.spec("embed", plan.vocab), rules.spec("batch", None, None)
    rows: Any = rules.spec("batch", None)
    return per_device(local, (stored, tokens, rows), rows)(matrix, hidden, targets)


def _plan(matrix: Array, hidden: Array, rules: Rules, compute: str, tied: bool, piece: int | None) -> _Plan:
    if piece is None:
        rows = hidden.shape[0] // rules.shards("batch")
        piece = piece_tokens(rows, matrix.shape[1], 1 if tied else rules.shards("vocab"))
    return _Plan(rules, compute, tied, min(piece, hidden.shape[1]))


def piece_tokens(rows: int, vocab: int, cuts: int) -> int:
    """Tokens of a row at a time, for so many rows on a device and a vocabulary cut in so many pieces."""
    logits = WHOLE_LOGITS if cuts == 1 and has_mesh() else LOGITS
    return max(1, logits // max(rows * vocab // cuts, 1))


def loss_if(asked: Bool[Array, ""], loss: Callable[[], tuple[Scalar, Scalar]]) -> tuple[Scalar, Scalar]:
    """`loss()` where `asked`, else (0, 0) without running it; for a loss without gradient."""
    zero = jnp.zeros((), jnp.float32)
    return jax.lax.cond(asked, loss, lambda: (zero, zero))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan: _Plan, matrix: Array, hidden: Array, targets: Array) -> tuple[Scalar, Scalar]:
    loss, count = _run(plan, matrix, hidden, targets, gradients=False)
    return loss, count


def _loss_forward(
    plan: _Plan, matrix: Array, hidden: Array, targets: Array
) -> tuple[tuple[Scalar, Scalar], tuple[Array, Array]]:
    loss, count, d_matrix, d_hidden = _run(plan, matrix, hidden, targets, gradients=True)
    return (loss, count), (d_matrix, d_hidden)


def _loss_backward(plan: _Plan, kept: tuple[Array, Array], cotangents: tuple[Scalar, Scalar]) -> tuple[Any, ...]:
    scale = cotangents[0]
    with jax.named_scope("loss"):
        return *((scale * x).astype(x.dtype) for x in kept), None


_loss.defvjp(_loss_forward, _loss_backward)


def _run(plan: _Plan, matrix: Array, hidden: Array, targets: Array, gradients: bool) -> tuple[Array, ...]:
    """(loss, count) and, asked for, (dW, dh); each device has its own rows and its own part of the vocabulary."""
    rules = plan.rules
    stored, tokens, rows = rules.spec("embed", plan.vocab), rules.spec("batch", None, None), rules.spec("batch", None)
    whole: Any = rules.spec()
    results = (whole, whole, stored, tokens) if gradients else (whole, whole)
    local = functools.partial(_local, plan, gradients)
    with jax.named_scope("loss"):
        return per_device(local, (stored, tokens, rows), results)(matrix, hidden, reshard(targets, rows))


def _local(plan: _Plan, gradients: bool, matrix: Array, hidden: Array, targets: Array) -> tuple[Array, ...]:
    """On one device: pieces in order, then the sums over devices."""
    embed, vocab, batch = plan.axes("embed"), plan.axes(plan.vocab), plan.axes("batch")
    weight, first = _weight(plan, matrix)
    pieces = (_pieces(hidden, plan.piece, 0), _pieces(targets, plan.piece, -1))

    def step(carry: tuple[Array, ...], piece: tuple[Array, Array]) -> tuple[tuple[Array, ...], Any]:
        loss, count, *d_weight = carry
        state, target = piece[0].astype(weight.dtype), piece[1]
        one, d_logits = _piece(state, weight, target, first, vocab)
        total = (loss + jnp.sum(one), count + jnp.sum(target >= 0, dtype=jnp.float32))
        if not gradients:
            return total, None
        narrow = d_logits.astype(weight.dtype)
        d_state = jnp.einsum("btv,dv->btd", narrow, weight, preferred_element_type=jnp.float32)
        d_state = jax.lax.psum(d_state, vocab) if vocab else d_state
        more = jnp.einsum("btd,btv->dv", state, narrow, preferred_element_type=jnp.float32)
        return (*total, d_weight[0] + more), d_state.astype(hidden.dtype)

    zero = jnp.zeros((), jnp.float32)
    start: tuple[Array, ...] = (zero, zero, jnp.zeros(weight.shape, jnp.float32)) if gradients else (zero, zero)
    (loss, count, *d_weight), d_pieces = jax.lax.scan(step, start, pieces)
    sums = tuple(jax.lax.psum(x, batch) if batch else x for x in (loss, count))
    if not gradients:
        return sums
    d_hidden = jnp.moveaxis(d_pieces, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, : hidden.shape[1]]
    return *sums, _summed(d_weight[0], batch, embed).astype(matrix.dtype), d_hidden


def _weight(plan: _Plan, matrix: Array) -> tuple[Array, Any]:
    """This device's part of the vocabulary, whole along "embed", in the compute dtype; the token of its column 0."""
    embed, vocab = plan.axes("embed"), plan.axes(plan.vocab)
    weight = matrix.astype(plan.compute)
    weight = jax.lax.all_gather(weight, embed, axis=0, tiled=True) if embed else weight
    return weight, jax.lax.axis_index(vocab) * weight.shape[1] if vocab else 0


def _pieces(x: Array, piece: int, filling: int) -> Array:
    """[b, t, …] -> [pieces, b, piece, …], filled up at the end."""
    count = math.ceil(x.shape[1] / piece)
    padding = [(0, 0), (0, count * piece - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    filled = jnp.pad(x, padding, constant_values=filling)
    return jnp.moveaxis(filled.reshape(x.shape[0], count, piece, *x.shape[2:]), 1, 0)


def _piece(state: Array, weight: Array, target: Array, first: Any, vocab: tuple[str, ...]) -> tuple[Array, Array]:
    """(loss [b, t], d logits) of one piece; `first` is the token of this device's column 0."""
    logits = jnp.einsum("btd,dv->btv", state, weight, preferred_element_type=jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    top = jax.lax.pmax(top, vocab) if vocab else top
    powers = jnp.exp(logits - top)
    hit = jnp.arange(weight.shape[1], dtype=jnp.int32)[None, None] + first == target[..., None]
    total, chosen = jnp.sum(powers, axis=-1, keepdims=True), jnp.sum(jnp.where(hit, logits, 0.0), -1, keepdims=True)
    if vocab:
        total, chosen = jax.lax.psum((total, chosen), vocab)
    counted = (target >= 0)[..., None]
    loss = jnp.where(counted, top + jnp.log(total) - chosen, 0.0)
    d_logits = jnp.where(counted, powers / total - hit.astype(jnp.float32), 0.0)
    return loss[..., 0], d_logits


def _summed(x: Array, batch: tuple[str, ...], embed: tuple[str, ...]) -> Array:
    """The sum over the devices of "batch", each keeping its own part along "embed"."""
    both = tuple(axis for axis in embed if axis in batch)
    rest = tuple(axis for axis in batch if axis not in embed)
    x = jax.lax.psum(x, rest) if rest else x
    if both != embed:  # an "embed" axis that the batch does not use holds copies: each device takes its part
        size = x.shape[0] // math.prod(jax.lax.axis_size(axis) for axis in embed)
        x = jax.lax.psum(x, both) if both else x
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(embed) * size, size, axis=0)
    return jax.lax.psum_scatter(x, embed, scatter_dimension=0, tiled=True) if embed else x
