"""One block: a pattern of layers, and how each of them enters the stream; the body of the scan over blocks.

- residual: X + gain Delta(X), the layer's own doing.
- lambda: X <- a X + b X0 first, plus the named skips.
- midpoint: p_{l+1} = mixing p_{l-1} + (1 - mixing) p_l + 2 step gain Delta(p_l).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.models.layers.adaptive_depth import PassControl, stream_mean
from gt_jax.models.layers.compaction import bucket_lengths
from gt_jax.models.layers.early_exit import alive, alive_share, exit_step
from gt_jax.models.layers.gated_copies import Registers, places_of, read_register, write_register
from gt_jax.models.layers.mixer import Place, real_tokens
from gt_jax.models.layers.pass_statistics import PassStatistics
from gt_jax.models.layers.replay import Entered, LayerStep, Steps, runs_of
from gt_jax.models.layers.residual import Layer, Update, moved_variance
from gt_jax.models.layers.reversible import Delta
from gt_jax.models.layers.sow import INTERMEDIATES, PASSES, asked_for, sow
from gt_jax.models.layers.stack import Coefficients, SkipBuffer, advance, enter, record
from gt_jax.typing import Activations, State, Tree
from pallas_kernels.gated_delta_rule.xla import SAVED_NAMES
from pallas_kernels.platform import target_device


class Stream(NamedTuple):
    """What goes from layer to layer: X, the mean stream after a first pass, and what the kind of stack needs.

    `previous` is p_{l-1} of the midpoint stack, `exit` the `ExitState`; None elsewhere. `gates` are the registers of
    gated copies, none elsewhere. `entered` keeps what enters each layer where the backward pass is a replay.
    """

    x: State
    first: Activations
    previous: Any
    skips: SkipBuffer
    exit: Any
    gates: Registers = ()
    entered: Entered | None = None


class Common(NamedTuple):
    """What every layer of the stack is given.

    Place, control of the passes but for the counts forced, embedded X; weights of the skips [s] and `ExitWeights` of
    the unit that lets tokens leave, None without them.
    """

    place: Place
    control: PassControl
    x0: State
    skip_weights: Any
    exit_weights: Any


class Block(nn.Module):
    """One pattern of layers, `layer0` … in order; the body of the scan over blocks."""

    pattern: str
    config: ModelConfig
    rules: Rules

    @nn.compact
    def __call__(
        self, stream: Stream, common: Common, xs: tuple[Array, Array, Coefficients, Tree]
    ) -> tuple[Stream, tuple[PassStatistics, Tree]]:
        forced, numbers, mixing, caches = xs
        statistics, new_caches, link = [], {}, None
        for slots in self._runs(caches):
            first = slots.start
            if len(slots) > 1:
                cut = jax.tree.map(lambda a, slots=slots: a[slots.start : slots.stop], (forced, numbers, mixing))
                stream, seen = self._alike(slots, stream, common, cut)
                statistics.append(seen)
                continue
            layer = Layer(self.pattern[first], self.config, self.rules, name=f"layer{first}")
            cache = None if caches is None else caches[layer.name]
            given = jax.tree.map(lambda a, slot=first: a[slot], (forced, numbers, mixing))
            if self.config.exit is not None:
                stream, seen, new_cache = self._leaving(layer, stream, common, numbers[first], cache)
            else:
                stream, seen, new_cache, new_link = self._one(layer, stream, common, given, cache, link)
                link = new_link or link
            new_caches[layer.name] = new_cache
            statistics.append(jax.tree.map(lambda a: a[None], seen))
        together = jax.tree.map(lambda *a: jnp.concatenate(a), *statistics)
        return stream, (together, None if caches is None else new_caches)

    def _runs(self, caches: Tree) -> list[range]:
        """The slots in order, those together that one program runs: neighbours of kind D.

        Each alone where parameters are made, where someone looks inside, where a cache is updated in place, and where
        a layer hands something on beside the stream.
        """
        c, slots = self.config, range(len(self.pattern))
        looked_into = asked_for(self, INTERMEDIATES) or asked_for(self, PASSES)
        alone = self.is_initializing() or looked_into or caches is not None
        if alone or c.exit is not None or not compiled_once(c):
            return [range(slot, slot + 1) for slot in slots]
        return [range(start, stop) for start, stop in runs_of(self.pattern)]

    def _alike(
        self, slots: range, stream: Stream, common: Common, given: tuple[Array, Array, Coefficients]
    ) -> tuple[Stream, PassStatistics]:
        """Neighbours that differ in their weights alone, compiled once: a scan over their weights, stacked."""
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *(slot_variables(self.variables, slot) for slot in slots))
        kind = self.pattern[slots.start]

        def body(stream: Stream, xs: Tree) -> tuple[Stream, PassStatistics]:
            variables, numbers = xs
            layer = Layer(kind, self.config, self.rules, parent=None, name=f"layer{slots.start}").bind(variables)
            moved, seen, _, _ = self._one(layer, stream, common, numbers, None, None)
            return moved, seen

        return cast(tuple[Stream, PassStatistics], jax.lax.scan(body, stream, (stacked, given)))

    def _one(
        self, layer: Layer, stream: Stream, common: Common, given: tuple[Array, Array, Coefficients], cache: Tree,
        link: Tree,
    ) -> tuple[Stream, PassStatistics, Tree, Tree]:  # fmt: skip
        """One layer: (stream, statistics, cache, link); computed again in the backward pass if `remat` is "layer"."""

        def move(layer: Layer, stream: Stream, cache: Tree, link: Tree) -> tuple[Stream, PassStatistics, Tree, Tree]:
            return self._moved(layer, stream, common, given, cache, link)

        again = self.config.remat == "layer" and not self.is_initializing()
        moved = (nn.remat(move, prevent_cse=False) if again else move)(layer, stream, cache, link)
        return cast(tuple[Stream, PassStatistics, Tree, Tree], moved)

    def _moved(
        self, layer: Layer, stream: Stream, common: Common, given: tuple[Array, Array, Coefficients], cache: Tree,
        link: Tree,
    ) -> tuple[Stream, PassStatistics, Tree, Tree]:  # fmt: skip
        """One layer of a residual, lambda or midpoint stack."""
        forced, number, mixing = given
        if self.config.stack.kind == "midpoint":
            one = layer.update(stream.x, common.place, cache, link)
            x = advance(stream.previous, stream.x, one.value, mixing)
            return stream._replace(x=x, previous=stream.x, first=stream_mean(x)), one.statistics, one.cache, one.link
        x, skips = stream.x, self.config.stack.skips
        if self.config.stack.kind == "lambda":
            x = enter(x, stream.skips, common.skip_weights, number, skips)
            x = layer.mixed(x, common.x0)
        place = common.place
        if place.key is not None:  # each layer draws for itself
            place = place._replace(key=jax.random.fold_in(place.key, number))
        if (copies := self.config.gated_copies) is not None:
            reads, writes, k = places_of(copies, number)
            x, seen, new_cache, gate = layer.gated(x, place, read_register(stream.gates, reads, x), k, cache)
            gates = write_register(stream.gates, writes, gate)
            return stream._replace(x=x, first=stream_mean(x), gates=gates), seen, new_cache, None
        entered = None if stream.entered is None else stream.entered.kept(stream.x, number)
        x, first, seen, new_cache, new_link = layer(x, place, common.control._replace(forced=forced), cache, link)
        kept = record(x, stream.skips, number, skips)
        return stream._replace(x=x, first=first, skips=kept, entered=entered), seen, new_cache, new_link

    def _leaving(
        self, layer: Layer, stream: Stream, common: Common, number: Array, cache: Tree
    ) -> tuple[Stream, PassStatistics, Tree]:
        """One layer of depth-wise ACT: on the tokens that have not left the stack, fewer in truth where none trains."""
        place, real, exit = common.place, real_tokens(common.place.segment_ids), self.config.exit
        assert exit is not None

        def delta(layer: Layer, x: Array, segment_ids: Array, positions: Array, cache: Tree) -> tuple[Tree, ...]:
            start = None if cache is None else positions[:, 0]
            one = layer.update(x, Place(segment_ids, positions, start, place.key), cache)
            return one.value, one.statistics, one.cache

        if asked_for(layer, PASSES):
            sow(layer, "runs", alive(stream.exit) & (real > 0), PASSES)
        training = self.is_mutable_collection("statistics")
        share = alive_share(stream.exit, real)[None]
        state, seen, new_cache = exit_step(
            layer, delta, stream.exit, place.segment_ids, place.positions, cache, weights=common.exit_weights,
            threshold=exit.threshold, last=number == len(self.config.depth) - 1, rules=self.rules,
            buckets=None if training else bucket_lengths(place.segment_ids.shape[1]),
        )  # fmt: skip
        return stream._replace(x=state.x, exit=state), seen._replace(survival=share, alive=share, ran=share), new_cache


def compiled_once(config: ModelConfig) -> bool:
    """Whether neighbours of kind D are one program: where a layer is computed again, and on a TPU or GPU a pass.

    The step of the 8B model then compiles in half the time. A loop stacks what the backward pass needs and cuts it out
    again: cheap for what a layer starts from, a fifth of the step's traffic for all that it computes. The passes of an
    adaptive model on a CPU gain nothing from it. The groundthink variant has a link from layer to layer.
    """
    again = config.remat == "layer" or (config.remat == "pass" and target_device()[0] != "cpu")
    return again and config.deltanet is not None and config.deltanet.variant == "gated"


def remats_blocks(config: ModelConfig) -> bool:
    """Whether the backward pass computes a block's activations again, from what entered it.

    Tokens that leave between the layers make all of a block one piece.
    """
    return config.remat in ("block", "kernels") or (config.remat == "layer" and config.exit is not None)


def remat_policy(config: ModelConfig) -> Callable[..., bool] | None:
    """What is kept of a rematerialised block beside its input; None is nothing."""
    return jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES) if config.remat == "kernels" else None


def slot_variables(variables: Mapping[str, Any], slot: int) -> Tree:
    """Those of one layer, of a block's."""
    return {name: block[f"layer{slot}"] for name, block in variables.items() if f"layer{slot}" in block}


def layer_delta(kind: str, slot: int, config: ModelConfig, rules: Rules) -> Delta:
    """A layer's update as a function of its block's variables, for `reversible_stack`; extras are the statistics."""
    layer = Layer(kind, config, rules, parent=None)

    def delta(variables: Tree, x: State, place: Place) -> tuple[State, PassStatistics]:
        one = cast(Update, layer.apply(slot_variables(variables, slot), x, place, method=Layer.update))
        return one.value, one.statistics

    return delta


def replays(config: ModelConfig) -> bool:
    """Whether a row's chunks run backward together, layer by layer: where a layer is computed again anyway, in a plain
    residual stack, whose layers hand on nothing but X."""
    c = config
    plain = c.adaptive is None and c.exit is None and c.gated_copies is None and c.sliding is None
    residual = c.stack.kind == "residual" and not c.stack.skips
    return c.memory is not None and c.remat == "layer" and plain and residual


def replayed_steps(pattern: str, config: ModelConfig, rules: Rules) -> Steps:
    """What `replay` needs of a segment of this pattern."""

    def step(kind: str, slot: int) -> LayerStep:
        layer = Layer(kind, config, rules, parent=None, name=f"layer{slot}")
        unread = PassControl(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32))  # a plain layer has one pass

        def run(variables: Tree, x: State, place: Place) -> tuple[State, PassStatistics]:
            moved, _, seen, _, _ = cast(tuple[Any, ...], layer.apply(variables, x, place, unread))
            return moved, seen

        return run

    runs = runs_of(pattern) if compiled_once(config) else tuple((slot, slot + 1) for slot in range(len(pattern)))
    layers = tuple(step(kind, slot) for slot, kind in enumerate(pattern))
    return Steps(pattern, layers, runs, config.compute_dtype, rules)


def observed(statistics: Tree, seen: PassStatistics, pattern: str, keep: float) -> Tree:
    """The statistics of a segment after a training step: the running variance of its G layers moved by `seen`.

    `seen.score_variance` is [blocks, slots, passes].
    """
    moved = dict(statistics)
    for slot in (slot for slot, kind in enumerate(pattern) if kind == "G"):
        old = statistics[f"layer{slot}"]["mixer"]["variance_ema"]
        new = moved_variance(old, seen.score_variance[:, slot, 0], keep)
        moved[f"layer{slot}"] = {"mixer": {"variance_ema": new}}
    return moved
