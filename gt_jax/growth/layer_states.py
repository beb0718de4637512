"""Hidden states after chosen layers, the gains of a model as one vector, and the derivative of the one by the other.

- Layers are scanned block by block, as in `models.language_model`; only the states that are asked for leave the scan.
- The kernels and routers define a reverse rule only (`custom_vjp`), which `jax.jvp` refuses. The reverse pass is linear
  in its cotangent, so its own reverse pass is the forward derivative, exact, and works with every mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gt_jax.configs.layout import Segment
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, reshard
from gt_jax.models.language_model import LanguageModel
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.models.layers.block import remat_policy, remats_blocks, slot_variables
from gt_jax.models.layers.hyper_connections import to_streams
from gt_jax.models.layers.memory_stream import Memory, carry_memory
from gt_jax.models.layers.mixer import Place, place_rows
from gt_jax.models.layers.residual import Layer
from gt_jax.models.memory_chunks import over_chunks
from gt_jax.typing import State, Tokens, Tree

States = Float[Array, "s b t *n d"]
Gains = Float[Array | np.ndarray, "l"]


def gains_of(config: ModelConfig, variables: Tree) -> Float[np.ndarray, " l"]:
    """The `gain` of every layer, in the order of the layers."""
    gains = np.zeros(len(config.depth), np.float32)
    for segment, slot, layers in _slots(config):
        gains[layers] = np.asarray(variables["params"][f"segment{segment}"][f"layer{slot}"]["gain"])
    return gains


def with_gains(config: ModelConfig, variables: Tree, gains: Gains) -> Tree:
    """The same variables with other gains; numpy stays numpy, and every other leaf is the same object."""
    params = dict(variables["params"])
    for segment, slot, layers in _slots(config):
        name, place = f"segment{segment}", f"layer{slot}"
        old = params[name][place]["gain"]
        own = gains[layers].astype(old.dtype)
        if isinstance(own, np.ndarray) and isinstance(old, jax.Array):
            own = jax.device_put(own, old.sharding)
        params[name] = {**params[name], place: {**params[name][place], "gain": own}}
    return {**variables, "params": params}


def _slots(config: ModelConfig) -> list[tuple[int, int, slice]]:
    """(segment, slot of its pattern, the layers stacked there)."""
    found, first = [], 0
    for index, segment in enumerate(config.depth.segments):
        last, step = first + len(segment), len(segment.pattern)
        found += [(index, slot, slice(first + slot, last, step)) for slot in range(step)]
        first = last
    return found


def states_after(
    config: ModelConfig, rules: Rules, variables: Tree, layers: Sequence[int], batch: Mapping[str, Any],
    control: PassControl,
) -> States:
    """X after each of the `layers` (rising), [layers, b, t, *n, d] in the compute dtype, in evaluation mode.

    `batch` holds tokens and segment_ids [b, t]; rows longer than the chunk of a memory stream run chunk by chunk.
    Residual stacks, and lambda stacks without skips. Differentiable in the gains, twice, though not along what a memory
    stream carries.
    """
    config = config.twice_differentiable
    network = LanguageModel(config, rules)

    def chunk(carry: tuple[Tree, Memory | None], piece: tuple[Mapping[str, Array], Array]) -> tuple[Any, States]:
        tokens, segment_ids = piece[0]["tokens"], piece[0]["segment_ids"]
        place = place_rows(segment_ids, rules=rules)
        x = cast(Array, network.apply(variables, tokens, place.segment_ids, carry[1], method=_enter))
        states, last = _run(config, rules, variables, layers, x, place, control)
        memory = None if config.memory is None else carry_memory(last, place.segment_ids, config.memory.stream)
        return (carry[0], memory), states

    rows = {name: reshard(jnp.asarray(batch[name]), rules.spec("batch", None)) for name in ("tokens", "segment_ids")}
    _, pieces = over_chunks(chunk, config, rules, (), rows)  # [chunks, s, b, t of a chunk, …]
    whole = jnp.moveaxis(pieces, 0, 2)
    return whole.reshape(*whole.shape[:2], -1, *whole.shape[4:])


def _enter(network: LanguageModel, tokens: Tokens, segment_ids: Tokens, memory: Memory | None) -> State:
    """X before the first layer."""
    c = network.config
    embedded = network.embedding(tokens)
    x = embedded if c.hyper is None else to_streams(embedded, c.hyper.streams)
    return x if c.memory is None else network.memory(x, embedded, segment_ids, memory, c.memory.stream)


def _run(
    config: ModelConfig, rules: Rules, variables: Tree, layers: Sequence[int], x: State, place: Place,
    control: PassControl,
) -> tuple[States, State]:
    """(X after each of `layers`, X after the last layer of all); `x` is X before the first."""
    depth, first, x0 = config.depth, 0, x
    found: dict[int, Array] = {}
    forced = jnp.broadcast_to(jnp.asarray(control.forced, jnp.int32), (len(depth),))
    for index, segment in enumerate(depth.segments):
        name, own = f"segment{index}", slice(first, first + len(segment))
        stored = {kind: tree[name] for kind, tree in variables.items() if name in tree}
        wanted = {layer: depth.position(layer)[1:] for layer in layers if own.start <= layer < own.stop}
        slots = tuple(sorted({slot for _, slot in wanted.values()}))
        body = _block(config, rules, segment, slots, place, control, x0)
        x, kept = jax.lax.scan(body, x, (stored, forced[own].reshape(segment.repeats, len(segment.pattern))))
        found |= {layer: kept[slots.index(slot)][block] for layer, (block, slot) in wanted.items()}
        first = own.stop
    return jnp.stack([found[layer] for layer in layers]), x


def _block(
    config: ModelConfig, rules: Rules, segment: Segment, slots: tuple[int, ...], place: Place, control: PassControl,
    x0: State,
) -> Callable[..., Any]:
    """The body of the scan over a segment's blocks: X -> (X, X after each of the `slots`)."""
    layers = [Layer(kind, config, rules, parent=None) for kind in segment.pattern]

    def block(x: State, xs: tuple[Tree, Array]) -> tuple[State, list[State]]:
        stored, forced = xs
        link, kept = None, []
        for slot, layer in enumerate(layers):
            own = slot_variables(stored, slot)
            if config.stack.kind == "lambda":
                x = cast(Array, layer.apply(own, x, x0, method=Layer.mixed))
            given = (x, place, control._replace(forced=forced[slot]), None, link)
            apply = jax.checkpoint(layer.apply, prevent_cse=False) if config.remat == "layer" else layer.apply
            x, _, _, _, new_link = apply(own, *given)  # type: ignore[misc]
            link = new_link or link
            kept += [x] if slot in slots else []
        return x, kept

    return jax.checkpoint(block, prevent_cse=False, policy=remat_policy(config)) if remats_blocks(config) else block


def columns(
    function: Callable[[Array], Array], at: Float[Array, " l"]
) -> tuple[Float[Array, "..."], Float[Array, "l ..."]]:
    """(function(at), its derivative by each component of `at` along a leading axis), exact; one component at a time.

    The product with a tangent is the transpose of the product with a cotangent.
    """
    value, pull = jax.vjp(function, at)
    _, push = jax.vjp(lambda cotangent: pull(cotangent)[0], jnp.zeros_like(value))
    return value, jax.lax.map(lambda tangent: push(tangent)[0], jnp.eye(at.shape[0], dtype=at.dtype))
