"""Rows of a token table whose columns lie on different devices.

- The table goes to the tokens: every device gathers all of it, and adds up a gradient as large. Or the tokens go to the
  table: the devices that share it tell each other their token ids, each reads its own columns of all those rows, and
  an all-to-all hands every device the whole rows of its own tokens. The gradient goes the same way back, to the columns
  that it is of.
- The second way brings a row for each token and the first one for each entry of the vocabulary: the fewer are taken.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.devices.sharding import Rules, has_mesh, on_mesh, per_device, reshard
from gt_jax.models.layers.primitives import widen
from gt_jax.typing import Activations, Tokens


def table_rows(table: Float[Array, "vocab d"], tokens: Tokens, rules: Rules) -> Activations:
    """table[token] in the table's own dtype; the gradients of a frequent token are summed in float32, rounded once.

    `table` is laid out as `Rules.spec(None, "embed")`.
    """
    if has_mesh() and _tokens_travel(table.shape[0], tokens, rules):
        return _rows_by_columns(table, tokens, rules)
    return _rows_of_whole(reshard(table, rules.gathered(None, "embed")), tokens, rules)


def look_up(table: Array, tokens: Tokens, rules: Rules) -> Array:
    """table[token] of a table that every device has whole."""
    axes = ("batch", None) + (None,) * (table.ndim - 1)
    return table.at[tokens].get(out_sharding=on_mesh(rules.spec(*axes)))


def _tokens_travel(vocab: int, tokens: Tokens, rules: Rules) -> bool:
    """Whether the devices that share the table hold different tokens, each fewer than the table has rows."""
    shared = set(rules.mesh_axes("embed")) <= set(rules.mesh_axes("batch"))
    return shared and rules.shards("embed") > 1 and tokens.size // rules.shards("batch") < vocab


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows_of_whole(table: Float[Array, "vocab d"], tokens: Tokens, rules: Rules) -> Activations:
    return look_up(table, tokens, rules)


def _whole_forward(table: Array, tokens: Tokens, rules: Rules) -> tuple[Array, tuple[Array, Array]]:
    return look_up(table, tokens, rules), (table, tokens)


def _whole_backward(rules: Rules, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, tokens = saved
    _, pull = jax.vjp(lambda wide: look_up(wide, tokens, rules), widen(table))  # for its shape and place alone
    return pull(widen(gradient))[0].astype(table.dtype), None


_rows_of_whole.defvjp(_whole_forward, _whole_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows_by_columns(table: Float[Array, "vocab d"], tokens: Tokens, rules: Rules) -> Activations:
    axes = rules.mesh_axes("embed")

    def read(own: Array, ids: Array) -> Array:
        asked = jax.lax.all_gather(ids, axes, tiled=True)
        return jax.lax.all_to_all(own[asked], axes, 0, 2, tiled=True)

    rows = rules.spec("batch", None, None)
    return per_device(read, (rules.spec(None, "embed"), rules.spec("batch", None)), rows)(table, tokens)


def _columns_forward(table: Array, tokens: Tokens, rules: Rules) -> tuple[Array, tuple[Array, Array]]:
    return _rows_by_columns(table, tokens, rules), (table, tokens)


def _columns_backward(rules: Rules, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, tokens = saved
    axes = rules.mesh_axes("embed")
    others = tuple(name for name in rules.mesh_axes("batch") if name not in axes)

    def add(own: Array, ids: Array, gradient: Array) -> Array:
        asked = jax.lax.all_gather(ids, axes, tiled=True)
        mine = jax.lax.all_to_all(gradient, axes, 2, 0, tiled=True)
        start = jnp.zeros(own.shape, jnp.promote_types(own.dtype, jnp.float32))
        summed = start.at[asked].add(mine.astype(start.dtype))
        return (jax.lax.psum(summed, others) if others else summed).astype(own.dtype)

    columns = rules.spec(None, "embed")
    given = (columns, rules.spec("batch", None), rules.spec("batch", None, None))
    return per_device(add, given, columns)(table, tokens, gradient), None


_rows_by_columns.defvjp(_columns_forward, _columns_backward)
