"""The language model: the scanned stack of blocks between embedding and unembedding; nothing else.

- Blocks of a segment are scanned: every parameter carries one leading block axis, and compile time does not grow with
  depth.
- The stream X is [b, t, d], with hyper-connections [b, t, n, d], in the compute dtype; norms, gates, states, softmax
  and loss are float32.
- The stack is residual, lambda or midpoint (`layers.stack`); midpoint at mixing 1 runs backward by reconstruction
  (`layers.reversible`).
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, on_mesh, reshard, with_mesh_devices
from gt_jax.errors import Refused
from gt_jax.models.layers import attention, deltanet, early_exit, groundthink, gsa, resolvent, sliding
from gt_jax.models.layers.adaptive_depth import PassControl, stream_mean
from gt_jax.models.layers.block import Block, Common, Stream, layer_delta, observed, remat_policy, remats_blocks
from gt_jax.models.layers.early_exit import ExitHead, even_bias
from gt_jax.models.layers.embedding import Embedding
from gt_jax.models.layers.gated_copies import empty_registers
from gt_jax.models.layers.hyper_connections import to_streams
from gt_jax.models.layers.memory_stream import Memory, MemoryStream, carry_memory
from gt_jax.models.layers.mixer import Place, place_rows, real_tokens
from gt_jax.models.layers.mtp import MultiTokenPrediction
from gt_jax.models.layers.pass_statistics import PassStatistics
from gt_jax.models.layers.primitives import Einsum, RMSNorm, WeightSpec
from gt_jax.models.layers.replay import Entered
from gt_jax.models.layers.reversible import reversible_stack
from gt_jax.models.layers.reversible import start as start_pair
from gt_jax.models.layers.sow import INTERMEDIATES, PASSES
from gt_jax.models.layers.stack import coefficients, empty_buffer, enter
from gt_jax.typing import Activations, Scalar, State, Tokens, Tree
from pallas_kernels.platform import target_device

UNROLLED = 16  # layers; compiling takes longer with each


class ModelOutput(NamedTuple):
    """`logits` float32 [b,t,vocab] of `hidden` [b,t,d], the state before the final norm.

    Who needs a loss takes it from `hidden`: logits that nobody reads are not computed. `first_pass_hidden` is the state
    had the last layer run one pass. `statistics` have axes [l, p]; `cache` is what the next tokens go on from, None
    unless one was given. `mtp_logits`, of `mtp_hidden`, predict the token after the next, None unless asked for, with
    `mtp_loss`, what their layer's indexer learns from. `memory` is what the next chunk of the row starts with, None
    without a memory stream. `ponder` is the mean N + R of tokens that may leave the stack early, None where they may
    not.
    """

    logits: Float[Array, "b t vocab"]
    hidden: Activations
    first_pass_hidden: Activations
    statistics: PassStatistics
    cache: Tree
    mtp_logits: Array | None = None
    mtp_hidden: Array | None = None
    mtp_loss: Scalar | None = None
    memory: Memory | None = None
    ponder: Scalar | None = None


class Begun(NamedTuple):
    """What the first layer is given, X and where its tokens stand, and the embedded tokens."""

    x: State
    embedded: Activations
    place: Place


class LanguageModel(nn.Module):
    """tokens -> logits. `config.adaptive` None is the plain form of the same weights."""

    config: ModelConfig
    rules: Rules = Rules()

    def setup(self) -> None:
        c, rules = self.config, self.rules
        weights = WeightSpec(c.param_dtype, c.compute_dtype, c.init_std)
        self.embedding = Embedding(c.embedding, c.vocab, c.width, rules, weights, c.norm_epsilon)
        if c.memory is not None:
            self.memory = MemoryStream(c.width, c.memory.initial_strength, rules)
        if c.stack.skips:
            zeros = nn.initializers.zeros
            self.skips = self.param("skips", zeros, (len(c.stack.skips),), jnp.float32, on_mesh(rules.spec(None)))
        block = nn.remat(Block, prevent_cse=False, policy=remat_policy(c)) if remats_blocks(c) else Block
        for index, segment in enumerate(c.depth.segments):
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "statistics": 0, INTERMEDIATES: 0, PASSES: 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=segment.repeats,
                unroll=scan_unroll(c, segment.repeats, len(segment.pattern)),
                check_constancy_invariants=False,  # that check traces every block once more
            )
            setattr(self, f"segment{index}", scanned(segment.pattern, c, rules))
        self.final_norm = RMSNorm(c.width, rules, c.norm_epsilon)
        if not c.embedding.tied:
            self.unembedding = Einsum((c.width, c.vocab), ("embed", "vocab"), rules, weights)
        if c.exit is not None:
            self.exit = ExitHead(c.width, rules, even_bias(len(c.depth)))
        if c.mtp is not None:
            self.mtp = MultiTokenPrediction(c, rules)

    def __call__(
        self,
        tokens: Tokens,
        segment_ids: Tokens | None = None,
        *,
        control: PassControl | None = None,
        cache: Tree = None,
        memory: Memory | None = None,
        mtp: bool = False,
        key: Array | None = None,
    ) -> ModelOutput:
        """Logits of every position; with a cache, of these tokens after those the cache has seen.

        `segment_ids` number the documents of a row from 1, 0 is padding; None is one document a row.
        `control.forced` [] or [l] fixes the passes; None leaves them to the halting heads. `memory` is what the chunk
        before gave; `mtp` asks for the logits of the token after the next; `key` is given in training and draws what
        is dropped.
        """
        begun = self.begin(tokens, segment_ids, memory, None if cache is None else cache["position"], key)
        if self._reversible(cache):
            (stream, statistics), new_cache = self._run_reversible(begun.x, begun.place), None
        else:
            stream, statistics, new_cache = self._run(begun.x, begun.place, control or free_passes(), cache)
        if new_cache is not None:
            new_cache["position"] = cache["position"] + tokens.shape[1]
        ponder = None if stream.exit is None else early_exit.ponder(stream.exit, real_tokens(begun.place.segment_ids))
        return self.finish(stream.x, stream.first, statistics, begun, mtp)._replace(cache=new_cache, ponder=ponder)

    def begin(
        self, tokens: Tokens, segment_ids: Tokens | None = None, memory: Memory | None = None, start: Any = None,
        key: Array | None = None,
    ) -> Begun:  # fmt: skip
        """What the first layer is given: the embedded tokens, with the memory; `start` [b] is a cache's position."""
        c, rows = self.config, self.rules.spec("batch", None)
        tokens = reshard(tokens, rows)
        segment_ids = reshard(jnp.ones_like(tokens) if segment_ids is None else segment_ids, rows)
        place = place_rows(segment_ids, start, key, self.rules)
        embedded = self.embedding(tokens)
        x: State = embedded if c.hyper is None else to_streams(embedded, c.hyper.streams)
        if c.memory is not None:
            x = self.memory(x, embedded, segment_ids, memory, c.memory.stream)
        return Begun(x, embedded, place)

    def finish(
        self, x: State, first: Activations, statistics: PassStatistics, begun: Begun, mtp: bool = False
    ) -> ModelOutput:
        """What the model gives where X left the last layer, and `first` had that run one pass."""
        c, final = self.config, stream_mean(x)
        hidden = self.final_norm(final)
        ahead: tuple[Array | None, Array | None, Array | None] = (None, None, None)
        if c.mtp is not None and (mtp or self.is_initializing()):
            state, loss = self.mtp(hidden, begun.embedded, begun.place)
            ahead = (self.unembed(state), state, loss)
        carried = None if c.memory is None else carry_memory(x, begun.place.segment_ids, c.memory.stream)
        return ModelOutput(self._logits(hidden), final, first, statistics, None, *ahead, carried)

    def record(
        self, tokens: Tokens, segment_ids: Tokens, memory: Memory | None, entered: Entered
    ) -> tuple[State, Memory, Entered, PassStatistics]:
        """The layers of one chunk, for a backward pass that is a replay: (X after the last, memory it leaves, `entered`
        with what entered each layer, statistics [l, p])."""
        c, begun = self.config, self.begin(tokens, segment_ids, memory)
        assert c.memory is not None
        stream, statistics, _ = self._run(begun.x, begun.place, free_passes(), None, entered)
        assert stream.entered is not None
        carried = carry_memory(stream.x, begun.place.segment_ids, c.memory.stream)
        return stream.x, carried, stream.entered, statistics

    def _run(
        self, x: State, place: Place, control: PassControl, cache: Tree, entered: Entered | None = None
    ) -> tuple[Stream, PassStatistics, Tree]:
        """All layers, segment after segment."""
        c = self.config
        depth = len(c.depth)
        forced = jnp.broadcast_to(jnp.asarray(control.forced, jnp.int32), (depth,))
        numbers = jnp.arange(depth, dtype=jnp.int32)
        mixing = jax.tree.map(jnp.asarray, coefficients(depth, c.stack.mixing, c.stack.step))
        common = Common(place, control, x, self.skips if c.stack.skips else None, None)
        previous = x if c.stack.kind == "midpoint" else None
        stream = Stream(x, stream_mean(x), previous, empty_buffer(x, c.stack.skips), None, entered=entered)
        if c.gated_copies is not None:
            stream = stream._replace(gates=empty_registers(x, c.gated_copies))
        if c.exit is not None:
            common = common._replace(exit_weights=self.exit.weights())
            stream = stream._replace(exit=early_exit.start(x, place.segment_ids))
        statistics, new_cache, layer = [], {}, 0
        for index, segment in enumerate(c.depth.segments):
            name, shape = f"segment{index}", (segment.repeats, len(segment.pattern))
            own = slice(layer, layer + len(segment))
            cut = jax.tree.map(lambda a, own=own, shape=shape: a[own].reshape(shape), (forced, numbers, mixing))
            caches = None if cache is None else cache[name]
            stream, (seen, new_cache[name]) = getattr(self, name)(stream, common, (*cut, caches))
            statistics.append(jax.tree.map(_by_layer, seen))
            layer += len(segment)
        together = jax.tree.map(lambda *a: jnp.concatenate(a), *statistics)
        if any(end == depth for _, end in c.stack.skips):
            stream = self._with_last_skips(stream)
        if stream.exit is not None:
            left = stream.exit.output.astype(x.dtype)
            stream = stream._replace(x=left, first=stream_mean(left))
        return stream, together, None if cache is None else new_cache

    def _with_last_skips(self, stream: Stream) -> Stream:
        """The skips that end after the last layer, before the final norm."""
        skips, depth = self.config.stack.skips, len(self.config.depth)
        means = {source: stream_mean(kept) for source, kept in stream.skips.items()}
        return stream._replace(x=enter(stream.x, stream.skips, self.skips, depth, skips),
                               first=enter(stream.first, means, self.skips, depth, skips))  # fmt: skip

    def _reversible(self, cache: Tree) -> bool:
        """Whether the backward pass reconstructs the stack: decoding has none, nor has who looks inside."""
        stack = self.config.stack
        invertible = stack.kind == "midpoint" and stack.mixing == 1.0
        looked_into = self.is_mutable_collection(INTERMEDIATES)
        return invertible and cache is None and not self.is_initializing() and not looked_into

    def _run_reversible(self, x: State, place: Place) -> tuple[Stream, PassStatistics]:
        """All layers of the midpoint stack at mixing 1, remembering nothing but the last pair of states."""
        c, pair, statistics = self.config, start_pair(x), []
        for index, segment in enumerate(c.depth.segments):
            name = f"segment{index}"
            stored = {kind: self.variables[kind][name] for kind in ("params", "statistics")
                      if name in self.variables.get(kind, {})}  # fmt: skip
            deltas = tuple(layer_delta(kind, slot, c, self.rules) for slot, kind in enumerate(segment.pattern))
            pair, seen = reversible_stack(
                deltas, stored, pair, place, c.stack.step, first=index == 0, dtype=x.dtype.name
            )
            if c.gsa is not None and "statistics" in stored and self.is_mutable_collection("statistics"):
                moved = observed(stored["statistics"], seen, segment.pattern, c.gsa.ema_decay)
                self.put_variable("statistics", name, moved)
            statistics.append(jax.tree.map(_by_layer, seen))
        last = pair.current.astype(x.dtype)
        together = jax.tree.map(lambda *a: jnp.concatenate(a), *statistics)
        return Stream(last, stream_mean(last), None, {}, None), together

    def unembed(self, x: Activations) -> Float[Array, "b t vocab"]:
        """Final norm and unembedding: float32 logits."""
        return self._logits(self.final_norm(x))

    def normed(self, x: Activations) -> Activations:
        """The final norm."""
        return cast(Array, self.final_norm(x))

    def unembedding_matrix(self) -> Float[Array, "d vocab"]:
        """The weights of the unembedding, as they are stored."""
        return self.embedding.table.T if self.config.embedding.tied else cast(Array, self.unembedding.stored())

    def _logits(self, hidden: Activations) -> Float[Array, "b t vocab"]:
        if self.config.embedding.tied:
            return cast(Array, self.embedding.unembed(hidden))
        return self.unembedding("btd,dv->btv", hidden, ("batch", None, "vocab"), accumulate=True)


def scan_unroll(config: ModelConfig, blocks: int, layers: int = 1) -> int:
    """How many blocks of so many layers the compiler sees at once: all of a few on a CPU where nothing is computed
    again, else one.

    A loop stacks what its backward pass needs and cuts it out again. Where that is every activation, the copies were a
    fifth of a CPU's step. Forward it cuts the weights of its layers out, for each token that is decoded anew.
    """
    few = blocks * layers <= UNROLLED and config.remat == "none" and config.adaptive is None
    return blocks if few and target_device()[0] == "cpu" else 1


def _by_layer(a: Array) -> Array:
    """[blocks, slots, …] -> [layers, …]."""
    return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])


def apply_network(
    network: LanguageModel,
    variables: Tree,
    tokens: Tokens,
    segment_ids: Tokens | None = None,
    *,
    control: PassControl | None = None,
    cache: Tree = None,
    memory: Memory | None = None,
    mtp: bool = False,
) -> ModelOutput:
    """`network` applied to frozen variables: nothing is updated."""
    given = {"control": control, "cache": cache, "memory": memory, "mtp": mtp}
    return cast(ModelOutput, network.apply(variables, tokens, segment_ids, **given))


def free_passes() -> PassControl:
    """The halting heads decide."""
    return PassControl(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32))


def fixed_passes(passes: int | list[int] | tuple[int, ...] | Array) -> PassControl:
    """Exactly so many passes a layer (one number, or one a layer), each at full strength alpha_k.

    0 leaves a layer to its halting head. Raises `Refused` for what is no whole number of 0 or more.
    """
    given = passes if isinstance(passes, Array) else np.asarray(passes)
    traced = isinstance(given, jax.core.Tracer)
    if not jnp.issubdtype(given.dtype, jnp.integer) or (not traced and np.any(np.asarray(given) < 0)):
        raise Refused(f"passes are {passes}; whole numbers of 0 or more are needed, one or one a layer")
    return PassControl(jnp.asarray(given, jnp.int32), jnp.ones((), jnp.float32))


def empty_cache(config: ModelConfig, batch: int, length: int) -> Tree:
    """The decode cache of a model before the first token: recurrent states, and room for the keys of `length` tokens.

    Leaves are stacked [blocks, …], in the adaptive form [blocks, passes, …]: each pass has a state of its own.
    """

    def stacked(kind: str, repeats: int) -> Tree:
        one = _empty_layer_cache(kind, config, batch, length)
        lead = (repeats,) if config.adaptive is None else (repeats, config.adaptive.max_passes)
        return jax.tree.map(lambda a: jnp.broadcast_to(a.reshape((1,) * len(lead) + a.shape), (*lead, *a.shape)), one)

    cache: Tree = {"position": jnp.zeros((batch,), jnp.int32)}
    for index, segment in enumerate(config.depth.segments):
        slots = enumerate(segment.pattern)
        cache[f"segment{index}"] = {f"layer{slot}": stacked(kind, segment.repeats) for slot, kind in slots}
    return cache


def _empty_layer_cache(kind: str, config: ModelConfig, batch: int, length: int) -> Tree:
    """The cache of one pass of one layer."""
    dtype = config.compute_dtype
    if kind == "G":
        assert config.gsa is not None
        return gsa.empty_cache(config.gsa, batch, length, dtype)
    if kind == "S":
        assert config.sliding is not None
        return sliding.empty_cache(config.sliding, batch, dtype)
    if kind == "A":
        assert config.attention is not None
        return attention.empty_cache(config.attention, batch, length, dtype)
    if kind == "B":
        assert config.resolvent is not None
        return resolvent.empty_cache(config.resolvent, batch, dtype)
    assert config.deltanet is not None
    room = groundthink if config.deltanet.variant == "groundthink" else deltanet
    return room.empty_cache(config.deltanet, batch, dtype)


def _initialiser(config: ModelConfig, rules: Rules) -> Callable[[Array], Tree]:
    model = LanguageModel(config, rules)

    def init(key: Array) -> Tree:
        rows = jnp.zeros((rules.shards("batch"), 2), jnp.int32)
        return dict(model.init(key, reshard(rows, rules.spec("batch", None))))

    return init


@functools.lru_cache(maxsize=32)
def _traced_once(config: ModelConfig, rules: Rules) -> Callable[[Array], Tree]:
    """`_initialiser`, for shapes alone: a command asks for those of one model several times, seconds each if deep."""
    return jax.jit(_initialiser(config, rules))


def initialise(config: ModelConfig, seed: int, rules: Rules | None = None) -> Tree:
    """Fresh {"params", "statistics"} of a model, drawn from `seed`, laid out by `rules` on the current mesh.

    Raises `Refused` for a seed that is no whole number of 32 bits: 2**32 would draw what 0 does.

    >>> import gt_jax, jax
    >>> variables = gt_jax.initialise(gt_jax.preset("tiny").replace(layout="DG"), seed=0)
    >>> sorted(variables), sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    (['params', 'statistics'], 457626)
    """
    if not (isinstance(seed, numbers.Integral) and 0 <= seed < 2**32):
        raise Refused(f"seed is {seed!r}; it must be a whole number in 0 … {2**32 - 1}")
    return jax.jit(_initialiser(config, rules or Rules()))(jax.random.key(int(seed)))


def abstract(config: ModelConfig, rules: Rules | None = None) -> Tree:
    """The shapes, dtypes and shardings of `initialise`, computing nothing: the 8B model without its memory."""
    init = _traced_once(config, rules or Rules())
    # the key is made inside: the devices of the mesh may be a topology that is only compiled for
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    return jax.tree.map(with_mesh_devices, shapes)
