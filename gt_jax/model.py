"""The language model: Block (one pattern), the scanned stack, embedding and unembedding; nothing else.

- Blocks of a segment are scanned: every parameter carries one leading block axis, and compile time does not grow with
  depth.
- The residual stream is kept in the compute dtype; norms, gates, states, softmax and loss are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.config import ModelConfig
from gt_jax.layers import deltanet, gsa
from gt_jax.layers.adaptive_depth import PassControl, PassStatistics
from gt_jax.layers.embedding import Embedding
from gt_jax.layers.primitives import Einsum, RMSNorm, WeightSpec
from gt_jax.layers.residual import Layer, Place
from gt_jax.sharding import Rules, reshard, with_devices
from gt_jax.typing import Activations, Tokens, Tree


class ModelOutput(NamedTuple):
    """`logits` float32 [b,t,vocab]; `first_pass_hidden` [b,t,d] is the final state had the last layer run one pass.

    `statistics` have axes [l, p]; `cache` is what the next tokens go on from, None unless one was given.
    """

    logits: Float[Array, "b t vocab"]
    first_pass_hidden: Activations
    statistics: PassStatistics
    cache: Tree


class Block(nn.Module):
    """One pattern of layers, `layer0` … in order; the body of the scan over blocks."""

    pattern: str
    config: ModelConfig
    rules: Rules

    @nn.compact
    def __call__(
        self, carry: tuple[Activations, Activations], place: Place, p_max: Array, xs: tuple[Array, Tree]
    ) -> tuple[tuple[Activations, Activations], tuple[PassStatistics, Tree]]:
        x, first = carry
        forced, caches = xs
        statistics, new_caches = [], {}
        for slot, kind in enumerate(self.pattern):
            name = f"layer{slot}"
            layer = Layer(kind, self.config, self.rules, name=name)
            cache = None if caches is None else caches[name]
            x, first, seen, new_caches[name] = layer(x, place, PassControl(forced[slot], p_max), cache)
            statistics.append(seen)
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *statistics)
        return (x, first), (stacked, None if caches is None else new_caches)


class LanguageModel(nn.Module):
    """tokens -> logits. `config.adaptive` None is the plain form of the same weights."""

    config: ModelConfig
    rules: Rules = Rules()

    def setup(self) -> None:
        c, rules = self.config, self.rules
        weights = WeightSpec(c.param_dtype, c.compute_dtype, c.init_std)
        self.embedding = Embedding(c.vocab, c.width, rules, weights)
        block = nn.remat(Block, prevent_cse=False) if c.remat == "block" else Block
        for index, segment in enumerate(c.depth.segments):
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "statistics": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),
                length=segment.repeats,
            )
            setattr(self, f"segment{index}", scanned(segment.pattern, c, rules))
        self.final_norm = RMSNorm(c.width, rules, c.norm_epsilon)
        self.unembedding = Einsum((c.width, c.vocab), ("embed", "vocab"), rules, weights)

    def __call__(
        self,
        tokens: Tokens,
        segment_ids: Tokens | None = None,
        *,
        control: PassControl | None = None,
        cache: Tree = None,
    ) -> ModelOutput:
        """Logits of every position; with a cache, of these tokens after those the cache has seen.

        `segment_ids` number the documents of a row from 1, 0 is padding; None is one document a row.
        `control.forced` [] or [l] fixes the passes; None leaves them to the halting heads.
        """
        rows = self.rules.spec("batch", None)
        tokens = reshard(tokens, rows)
        segment_ids = reshard(jnp.ones_like(tokens) if segment_ids is None else segment_ids, rows)
        control = free_passes() if control is None else control
        forced = jnp.broadcast_to(jnp.asarray(control.forced, jnp.int32), (len(self.config.depth),))
        place = Place(segment_ids, None if cache is None else cache["position"])
        x = self.embedding(tokens)
        carry = (x, x)
        statistics, new_cache, layer = [], {}, 0
        for index, segment in enumerate(self.config.depth.segments):
            name = f"segment{index}"
            passes = forced[layer : layer + len(segment)].reshape(segment.repeats, len(segment.pattern))
            caches = None if cache is None else cache[name]
            carry, (seen, new_cache[name]) = getattr(self, name)(carry, place, control.p_max, (passes, caches))
            statistics.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), seen))
            layer += len(segment)
        if cache is not None:
            new_cache["position"] = cache["position"] + tokens.shape[1]
        return ModelOutput(
            self.unembed(carry[0]),
            carry[1],
            jax.tree.map(lambda *a: jnp.concatenate(a), *statistics),
            None if cache is None else new_cache,
        )

    def unembed(self, x: Activations) -> Float[Array, "b t vocab"]:
        """Final norm and unembedding: float32 logits."""
        return self.unembedding("btd,dv->btv", self.final_norm(x), ("batch", None, "vocab"), accumulate=True)


def forward(
    network: LanguageModel,
    variables: Tree,
    tokens: Tokens,
    segment_ids: Tokens | None = None,
    *,
    control: PassControl | None = None,
    cache: Tree = None,
) -> ModelOutput:
    """`network` applied to frozen variables: nothing is updated."""
    return cast(ModelOutput, network.apply(variables, tokens, segment_ids, control=control, cache=cache))


def free_passes() -> PassControl:
    """The halting heads decide."""
    return PassControl(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32))


def fixed_passes(passes: int | list[int] | tuple[int, ...] | Array) -> PassControl:
    """Exactly so many passes a layer (one number, or one a layer), each at full strength alpha_k."""
    return PassControl(jnp.asarray(passes, jnp.int32), jnp.ones((), jnp.float32))


def empty_cache(config: ModelConfig, batch: int, length: int) -> Tree:
    """The decode cache of a model before the first token: recurrent states, and room for `length` keys.

    Leaves are stacked [blocks, …], in the adaptive form [blocks, passes, …]: each pass has a state of its own.
    """

    def stacked(kind: str, repeats: int) -> Tree:
        if kind == "D":
            one = deltanet.empty_cache(config.deltanet, batch, config.compute_dtype)
        else:
            one = gsa.empty_cache(config.gsa, batch, length, config.compute_dtype)
        lead = (repeats,) if config.adaptive is None else (repeats, config.adaptive.max_passes)
        return jax.tree.map(lambda a: jnp.broadcast_to(a.reshape((1,) * len(lead) + a.shape), (*lead, *a.shape)), one)

    cache: Tree = {"position": jnp.zeros((batch,), jnp.int32)}
    for index, segment in enumerate(config.depth.segments):
        slots = enumerate(segment.pattern)
        cache[f"segment{index}"] = {f"layer{slot}": stacked(kind, segment.repeats) for slot, kind in slots}
    return cache


def _initialiser(config: ModelConfig, rules: Rules) -> Callable[[Array], Tree]:
    model = LanguageModel(config, rules)

    def init(key: Array) -> Tree:
        rows = jnp.zeros((rules.shards("batch"), 2), jnp.int32)
        return dict(model.init(key, reshard(rows, rules.spec("batch", None))))

    return init


def initialise(config: ModelConfig, seed: int, rules: Rules | None = None) -> Tree:
    """Fresh {"params", "statistics"} of a model, drawn from `seed`, laid out by `rules` on the current mesh."""
    return jax.jit(_initialiser(config, rules or Rules()))(jax.random.key(seed))


def abstract(config: ModelConfig, rules: Rules | None = None) -> Tree:
    """The shapes, dtypes and shardings of `initialise`, computing nothing: the 8B model without its memory."""
    shapes = jax.eval_shape(_initialiser(config, rules or Rules()), jax.random.key(0))
    return jax.tree.map(with_devices, shapes)
