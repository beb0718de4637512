"""One chunk as the TPU kernels see it: its heads in packs, their keys, queries, gates and decays."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_delta_rule.tpu.packs import MASKED, Masks, Plan, expand, masks, widen
from pallas_kernels.matrix_unit import NN, NT, TN, Form, Ref, multiply


@dataclass(frozen=True)
class Pack:
    """The value heads of one pack: which lanes are theirs, and products with what they may share.

    `key_lanes` [C, k] or [C, p k] is on the left of a product; `key_rows` [p C, k] or [p C, p k] on the right of one.
    """

    plan: Plan
    index: int

    @property
    def shared(self) -> bool:
        return self.plan.shares_key(self.index)

    def value_lanes(self) -> slice:
        width = self.plan.pack * self.plan.value_width
        return slice(self.index * width, (self.index + 1) * width)

    def heads_of(self, ref: Ref) -> list[Array]:
        """[C, k] of the key head of each value head."""
        width = self.plan.key_width
        return [ref[0, :, key * width : (key + 1) * width] for key in self.plan.keys(self.index)]

    def key_lanes(self, ref: Ref) -> Array:
        heads = self.heads_of(ref)
        return heads[0] if self.shared else jnp.concatenate(heads, axis=1)

    def key_rows(self, ref: Ref) -> Array:
        heads = self.heads_of(ref)
        if self.shared:
            return jnp.concatenate(heads, axis=0)
        return expand(jnp.concatenate(heads, axis=1), self.plan.pack)

    def read_state(self, blocks: Ref) -> Float[Array, "k pv"]:
        """Out of blocks [1, heads, k, v]; or [v, p k], where the states are transposed."""
        return jnp.concatenate([blocks[0, head] for head in self.plan.members(self.index)], axis=1)

    def write_state(self, blocks: Ref, state: Float[Array, "k pv"]) -> None:
        for head, own in zip(self.plan.members(self.index), self.cut(state), strict=True):
            blocks[0, head] = own

    def with_state(self, left: Array, state: Float[Array, "k pv"], form: Form = NN) -> Array:
        """[C, k] S of each head; with form NT, [C, v] S^T, which a shared key sums over the pack."""
        if self.plan.pack == 1 or self.shared:
            return multiply(left, state, form, self.plan.exact)
        if self.plan.matrix_unit >= 2 * self.plan.key_width:
            return multiply(left, expand(_as(left, state, self.plan), self.plan.pack), form, self.plan.exact)
        pairs = zip(self.cut(left), self.cut(state), strict=True)
        return jnp.concatenate([multiply(x, y, form, self.plan.exact) for x, y in pairs], axis=1)

    def outer(self, keys: list[list[Array]], values: list[Float[Array, "c pv"]]) -> Float[Array, "k pv"]:
        """The sum of X^T Y over pairs of (the pack's keys, values)."""
        if self.plan.pack == 1 or self.shared:
            left, right = [heads[0] for heads in keys], values
        elif self.plan.matrix_unit >= 2 * self.plan.key_width:
            left = [head for heads in keys for head in heads]
            right = [expand(_as(left[0], x, self.plan), self.plan.pack) for x in values]
        else:
            cuts = [self.cut(_as(keys[0][0], x, self.plan)) for x in values]
            parts = [
                multiply(jnp.concatenate(xs), jnp.concatenate(ys), TN, self.plan.exact)
                for xs, ys in zip(zip(*keys, strict=True), zip(*cuts, strict=True), strict=True)
            ]
            return jnp.concatenate(parts, axis=1)
        right = [_as(left[0], x, self.plan) for x in right]
        return multiply(jnp.concatenate(left), jnp.concatenate(right), TN, self.plan.exact)

    def cut(self, x: Array) -> list[Array]:
        """The lanes of each head."""
        width = x.shape[1] // self.plan.pack
        return [x[:, i * width : (i + 1) * width] for i in range(self.plan.pack)]


def _as(like: Array, x: Array, plan: Plan) -> Array:
    """Narrow x before it is copied about, where the product would do so anyway."""
    return x if plan.exact else x.astype(jnp.bfloat16)


@dataclass(frozen=True)
class Gates:
    """gamma, lam, beta and the sums of log decays of a chunk: a column a head, [C, gates * heads]."""

    plan: Plan
    columns: Float[Array, "c columns"]
    rows: Float[Array, "rows pc"]  # the same again, a pack a row
    masks: Masks

    def of(self, name: str, pack: Pack, width: int) -> Float[Array, "c pw"]:
        return widen(self._columns(name, pack), width)

    def row(self, name: str, pack: Pack) -> Float[Array, "1 pc"]:
        index = self.plan.gates.index(name) * self.plan.packs + pack.index
        return self.rows[index : index + 1]

    def last(self, pack: Pack, width: int) -> Float[Array, "1 pw"]:
        """What is left at the end of the chunk of what entered it."""
        end = self.plan.chunk - 1
        ends = [x[end : end + 1] for x in self._columns("gamma", pack)]
        return jnp.concatenate([jnp.broadcast_to(x, (1, width)) for x in ends], axis=1)

    def between(self, pack: Pack) -> Float[Array, "c pc"]:
        """G_i - G_j, token i in the rows."""
        total = self.of("sum", pack, self.plan.chunk) - self.row("sum", pack)
        if "fine" in self.plan.gates:
            total = total + (self.of("fine", pack, self.plan.chunk) - self.row("fine", pack))
        return total

    def pair(self, pack: Pack) -> Float[Array, "c pc"]:
        """Gam[i, j] = e^(G_i - G_j) for i >= j of one segment, else 0."""
        return jnp.exp(jnp.where(self.masks.seen, self.between(pack), MASKED))

    def pair_transposed(self, pack: Pack) -> Float[Array, "c pc"]:
        """Gam^T, token j in the rows."""
        return jnp.exp(jnp.where(self.masks.seeing, -self.between(pack), MASKED))

    def _columns(self, name: str, pack: Pack) -> list[Array]:
        start = self.plan.gates.index(name) * self.plan.heads
        return [self.columns[:, start + head : start + head + 1] for head in self.plan.members(pack.index)]


def read_gates(plan: Plan, columns: Ref, rows: Ref, runs: tuple[Ref, ...]) -> Gates:
    """Gates out of the blocks of one grid step."""
    run_column, run_row = (ref[0, 0] for ref in runs) if runs else (None, None)
    return Gates(plan, columns[0, 0, 0], rows[0, 0, 0], masks(plan.chunk, plan.pack, run_column, run_row))


def scores(pack: Pack, q: Ref, k: Ref) -> tuple[Float[Array, "c pc"], Float[Array, "c pc"]]:
    """K K^T and Q K^T of every head of the pack, one product."""
    left = jnp.concatenate([pack.key_lanes(k), pack.key_lanes(q)], axis=0)
    both = multiply(left, pack.key_rows(k), NT, pack.plan.exact)
    return both[: pack.plan.chunk], both[pack.plan.chunk :]
