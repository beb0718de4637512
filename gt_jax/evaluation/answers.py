"""What a model says where an answer of known difficulty is asked: right or not, and the passes the token ran for it.

An answer is right where the most likely token of the whole vocabulary is the target. Answers of one instance are alike,
so the instance is the unit of every interval; instances of the same tokens are one, since a copy says nothing new.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, global_batch, reshard
from gt_jax.evaluation.pieces import in_pieces
from gt_jax.evaluation.token_passes import hidden_and_passes
from gt_jax.models.language_model import LanguageModel
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.text.task_part import instance_keys
from gt_jax.training.step import Batch, shard_batch
from gt_jax.typing import PerToken, Tree

_SAME_FOR_ALL = ("tokens", "targets", "segment_ids")


class Asked(NamedTuple):
    """The answers that batches ask for, in order: where each is [batch, row, token], how hard, and of which instance.

    `instance` counts from 0; `difficulty` is 1 or more.
    """

    place: Int[np.ndarray, "n 3"]
    difficulty: Int[np.ndarray, " n"]
    instance: Int[np.ndarray, " n"]


class Answers(NamedTuple):
    """Of each answer that is asked: whether it is `right`, its loss in nats, the passes of its token by layer.

    `ran` [l, p] is the share of all real tokens that run each pass, asked or not.
    """

    right: Bool[np.ndarray, " n"]
    nats: Float[np.ndarray, " n"]
    passes: Int[np.ndarray, "l n"]
    ran: Float[np.ndarray, "l p"]


def asked(batches: Sequence[Batch]) -> Asked:
    """Where `difficulty` is above 0 and there is a target. Raises ValueError for batches that ask for nothing."""
    missing = [str(number) for number, batch in enumerate(batches) if "difficulty" not in batch]
    if missing:
        raise ValueError(f"batches without the key difficulty: {', '.join(missing)}; take those of a task")
    places, difficulty, keys = [np.zeros((0, 3), np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for number, batch in enumerate(batches):
        here = (np.asarray(batch["difficulty"]) > 0) & (np.asarray(batch["targets"]) >= 0)
        rows, tokens = np.nonzero(here)
        places.append(np.stack([np.full_like(rows, number), rows, tokens], axis=1))
        difficulty.append(np.asarray(batch["difficulty"])[here].astype(np.int64))
        own = batch.get("unit")  # of documents, which may be one unit without being alike, as answers to one prompt are
        of = instance_keys(np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"])) if own is None else own
        keys.append(np.asarray(of).astype(np.uint64)[here])
    together = np.concatenate(keys)
    if together.size == 0:
        raise ValueError("nothing is asked in these batches: no token has a difficulty above 0 and a target")
    return Asked(np.concatenate(places), np.concatenate(difficulty), np.unique(together, return_inverse=True)[1])


@functools.lru_cache(maxsize=8)
def make_answers(
    model: ModelConfig, rules: Rules
) -> Callable[[Tree, Batch, PassControl], tuple[PerToken, PerToken, Int[Array, "l b t"]]]:
    """The jitted (variables, batch, control) -> right [b, t] (1 or 0), nats [b, t], passes by layer [l, b, t].

    The same model gives the same compiled function.
    """
    network = LanguageModel(model, rules)

    def figures(variables: Tree, batch: Batch, control: PassControl) -> tuple[PerToken, PerToken, Array]:
        placed = shard_batch(batch, rules)
        hidden, passes = hidden_and_passes(network, variables, placed["tokens"], placed["segment_ids"], control)

        def piece(states: Array, targets: Array) -> tuple[Array, Array]:
            logits: Any = network.apply(variables, states, method=LanguageModel.unembed)
            return right_and_nats(logits.astype(jnp.float32), targets)

        arrays = (hidden, placed["targets"])
        right, nats = cast(tuple[Array, Array], in_pieces(piece, arrays, (0, -1), model, rules))
        return right, nats, reshard(passes, P(None, None, None))  # every process reads all of it

    return jax.jit(figures)


def right_and_nats(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> tuple[PerToken, PerToken]:
    """(1 where the most likely token is the target, -log p(target)), both 0 where there is no target.

    Of equally likely tokens the first counts. Logits that are not finite are never right.
    """
    # a one-hot sum, not a gather: it keeps a vocabulary axis sharded
    hit = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None] == targets[..., None]
    nats = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    right = (jnp.argmax(logits, axis=-1) == targets) & jnp.isfinite(nats)
    return right.astype(jnp.float32), jnp.where(targets >= 0, nats, 0.0)


def answers(
    model: ModelConfig, variables: Tree, batches: Sequence[Batch], where: Asked, control: PassControl,
    rules: Rules | None = None,
) -> Answers:  # fmt: skip
    """What the model says at the places `where`, of `asked` the same batches, with these passes."""
    rules, layers = rules or Rules(), len(model.depth)
    each = PassControl(jnp.broadcast_to(jnp.asarray(control.forced, jnp.int32), (layers,)), control.p_max)
    figures, most = make_answers(model, rules), 1 if model.adaptive is None else model.adaptive.max_passes
    found, counts = [], np.zeros((layers, most + 1))
    for number, batch in enumerate(batches):
        given = global_batch({name: batch[name] for name in _SAME_FOR_ALL}, rules)
        right, nats, passes = (np.asarray(a) for a in jax.device_get(figures(variables, given, each)))
        rows, tokens = where.place[where.place[:, 0] == number, 1:].T
        found.append((right[rows, tokens] > 0, nats[rows, tokens], passes[:, rows, tokens]))
        real = np.asarray(batch["segment_ids"]) > 0
        counts += [np.bincount(of[real], minlength=most + 1) for of in passes]
    right, nats, passes = (np.concatenate(of, axis=-1) for of in zip(*found, strict=True))
    after = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]  # [l, k]: tokens of k passes or more
    return Answers(right, nats, passes, after[:, 1:] / after[:, :1])
