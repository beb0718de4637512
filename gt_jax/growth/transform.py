"""Growth as a pure function on a pytree: match every tensor first, then gather, add noise, scale.

- A tensor is known by its path, `params/segment0/layer0/mixer/query/w` (gt_jax.checkpoints.tree_paths). Layers of a
  segment are stacked along one leading, unsharded block axis.
- `match` works on shapes alone and refuses with a list of everything that does not fit; after it nothing can surprise.
- One block is the unit: child = c * (W + N) in float32, cast to the child's dtype. The noise N of a value depends on
  (seed, tensor name within the layer, target layer) and on the value's position in its block, on nothing else: neither
  the order of work, nor slicing (`grow_slice`), nor sharding changes a bit of the result (gt_jax.growth.noise). Without
  noise and scale a block is copied as it is.
- Other axes keep their sharding; everything runs under `jax.jit` and `jax.eval_shape`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct

from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs.model import ModelConfig
from gt_jax.errors import Refused, refuse_all
from gt_jax.growth import noise, noise_on_devices, rules
from gt_jax.growth.kept_gates import cannot_keep_gates, gates_of
from gt_jax.growth.lambda_stack import cannot_keep_skips, grown_skips
from gt_jax.growth.plan import Plan

Abstract = Mapping[str, ShapeDtypeStruct]
_CARRIERS = {"weights": (rules.SCALED,), "output": (rules.OUTPUT, rules.LAST_NORM), "gain": (rules.GAIN,)}


class Part(NamedTuple):
    """Where one block of a target tensor comes from. A tensor of the whole model has neither block nor layer.

    The `coefficient` of a rule in `rules.NEUTRAL` is 1 for the first copy of a layer and 0 for the others.
    """

    source: str
    block: int | None
    coefficient: float
    layer: int | None


class Leaf(NamedTuple):
    """One target tensor: its rule, its parts in block order, its shape and dtype, and its first source's shape."""

    path: str
    rule: str
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    old_shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """Whether the leading axis is the block axis (`parts[b]` makes block b)."""
        return self.parts[0].block is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the target tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """What a reader sees of it before it is made."""
        return {"path": self.path, "old_shape": list(self.old_shape), "shape": list(self.shape),
                "dtype": str(self.dtype), "rule": self.rule, "bytes": self.nbytes}


class Match(NamedTuple):
    """All target tensors by path, and the source tensors that the child does not have."""

    leaves: tuple[Leaf, ...]
    dropped: tuple[str, ...]


def abstract(tree: Mapping[str, Any]) -> dict[str, ShapeDtypeStruct]:
    """Shapes and dtypes by path of a nested dict of arrays (or of anything with shape and dtype)."""
    return {path: ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flatten(tree).items()}


def target_config(source_config: ModelConfig, plan: Plan, dtype: str | None = None) -> ModelConfig:
    """The child's config: the source's plain form with the plan's layout, and `dtype` as param_dtype where given.

    A plan that keeps gates gives copies that keep theirs (`gt_jax.growth.kept_gates`). Raises `Refused` when the plan
    was made for another layout, and for stacks that growth is not defined for: a copy of a layer continues its
    recurrence only where layers add their update to one stream, and have the gains for it; nor can a skip of a lambda
    stack start at a layer that is nowhere done (`gt_jax.growth.lambda_stack`).
    """
    wrong = []
    if source_config.depth != plan.source_layout:
        wrong.append(f"the plan is for a source of layout {plan.source_layout}, "
                     f"this source's config says {source_config.layout}")
    wrong += by_no_plan(source_config)
    skips = source_config.stack.skips
    if skips and not wrong:
        wrong += cannot_keep_skips(skips, plan)
    if plan.keeps_gates:
        wrong += cannot_keep_gates(source_config, plan)
    refuse_all(wrong, "the source cannot be grown:")
    stack = source_config.stack.replace(skips=grown_skips(skips, plan))
    config = source_config.plain.replace(layout=str(plan.target_layout), stack=stack,
                                         gated_copies=gates_of(source_config, plan))
    return config if dtype is None else config.replace(param_dtype=dtype)


def by_no_plan(source_config: ModelConfig) -> list[str]:
    """What keeps a source of this config from being grown, whatever the plan."""
    wrong = []
    if source_config.stack.kind == "midpoint":
        wrong.append("the source's stack is 'midpoint'; only 'residual' and 'lambda' can be grown")
    if source_config.exit is not None:
        wrong.append("the source's tokens leave the stack early (exit); a deeper stack would be another model")
    if source_config.gated_copies is not None:
        wrong.append("the source is grown already, and its copies keep their gates: what its layers add differs from "
                     "token to token, and a copy of one cannot say where in the chain it would stand")
    return wrong


def child_abstract(source_config: ModelConfig, plan: Plan, dtype: str | None = None) -> dict[str, ShapeDtypeStruct]:
    """The child's tensors as the model code declares them for `target_config`: what a checkpoint must fill.

    Raises `Refused` as `target_config` does. This is the `target` to match a checkpoint against: it knows which tensors
    stay float32 under a narrower param_dtype, and shows what half a checkpoint lacks.
    """
    from gt_jax.models import language_model  # loads Flax, which the pure part does without

    return abstract(language_model.abstract(target_config(source_config, plan, dtype)))


def target_abstract(source: Abstract, plan: Plan) -> dict[str, ShapeDtypeStruct]:
    """The child's tensors as they follow from the source's and the plan: leading axis replaced, and unless the plan
    keeps gates, halting dropped.
    """
    kept = {path: old for path, old in source.items() if _rule(path, plan) != rules.DROPPED}
    stacked = {path: parts for path in kept if (parts := rules.stacked_path(path))}
    flat = {path: old for path, old in kept.items() if path not in stacked}
    for target, entry in enumerate(plan.entries):
        segment, _, slot = plan.target_layout.position(target)
        origin = plan.source_layout.position(entry.source)
        blocks = plan.target_layout.segments[segment].repeats
        for path, parts in stacked.items():
            if (parts.segment, parts.slot) == (origin[0], origin[2]):
                shape = (blocks, *kept[path].shape[1:])
                flat.setdefault(str(parts._replace(segment=segment, slot=slot)),
                                ShapeDtypeStruct(shape, kept[path].dtype))
    return dict(sorted(flat.items()))


def match(source: Abstract, target: Abstract, plan: Plan, carry: str) -> Match:
    """Say for every target tensor where each of its blocks comes from.

    Raises `Refused` with one list of all tensors that match no rule, are missing, are left over, or have the wrong
    shape or kind of dtype, and of all layers that have no tensor to carry their coefficient.
    """
    if carry not in rules.CARRIES:
        raise Refused(f"carry {carry!r} is not one of {', '.join(rules.CARRIES)}")
    wrong = [f"source tensor {path} matches no rule" for path in sorted(source) if rules.rule(path) is None]
    wrong += [f"source tensor {path} has more than {noise.POSITIONS} values a block, the noise has no more positions"
              for path, leaf in source.items() if math.prod(leaf.shape[1 if rules.stacked_path(path) else 0 :])
              > noise.POSITIONS]
    wrong += _misplaced(source, plan)
    if plan.keeps_gates and carry != "gain":
        wrong.append(f"carry {carry!r} is not exact, and a plan that keeps gates is for exactness; take 'gain'")
    leaves = []
    for path in sorted(target):
        leaf = _leaf(path, source, target, plan, wrong)
        if leaf is not None:
            leaves.append(leaf)
    used = {part.source for leaf in leaves for part in leaf.parts}
    dropped, left_over = _unused(source, used, plan)
    if not wrong:  # a tensor already named above would be named here a second time
        wrong += [f"source tensor {path} has no place in the target" for path in left_over]
        wrong += _without_carrier(leaves, plan, carry)
    refuse_all(wrong, f"the source does not grow from {plan.source_layout} to {plan.target_layout}:")
    return Match(tuple(leaves), dropped)


def _rule(path: str, plan: Plan) -> str | None:
    """`rules.rule`; halting heads go along where the plan keeps them."""
    found = rules.rule(path)
    return rules.COPIED if found == rules.DROPPED and plan.keeps_gates else found


def _misplaced(source: Abstract, plan: Plan) -> list[str]:
    """Stacked source tensors outside the plan's source layout, or with another number of blocks."""
    wrong = []
    segments = plan.source_layout.segments
    for path in sorted(source):
        where = rules.stacked_path(path)
        if where is None or rules.rule(path) is None:
            continue
        if where.segment >= len(segments) or where.slot >= len(segments[where.segment].pattern):
            wrong.append(f"source tensor {path} is outside the layout {plan.source_layout}")
        elif (shape := tuple(source[path].shape))[:1] != (segments[where.segment].repeats,):
            wrong.append(f"source tensor {path} has shape {shape}; its leading axis must be the "
                         f"{segments[where.segment].repeats} blocks of segment {where.segment}")
    return wrong


def _leaf(path: str, source: Abstract, target: Abstract, plan: Plan, wrong: list[str]) -> Leaf | None:
    """The leaf of one target tensor, or None with the reasons added to `wrong`."""
    new, rule, where = target[path], _rule(path, plan), rules.stacked_path(path)
    if rule == rules.OUTPUT and rules.norm_after(path) in target:
        rule = rules.SCALED  # that norm carries in its place
    if rule is None or rule == rules.DROPPED:
        wrong.append(f"target tensor {path} " + ("matches no rule" if rule is None else
                                                 "belongs to adaptive depth, which a grown model does not have"))
        return None
    if where is None:
        parts: tuple[Part, ...] = (Part(path, None, 1.0, None),)
    else:
        segments = plan.target_layout.segments
        if where.segment >= len(segments) or where.slot >= len(segments[where.segment].pattern):
            wrong.append(f"target tensor {path} is outside the layout {plan.target_layout}")
            return None
        parts = _parts(where, plan, rule)
    if missing := sorted({part.source for part in parts if part.source not in source}):
        wrong.append(f"source tensor {', '.join(missing)} is missing; target tensor {path} needs it")
        return None
    before = len(wrong)
    for name in dict.fromkeys(part.source for part in parts):
        wrong += _unfit(name, source[name], path, new, rule, len(parts) if where else None)
    if len(wrong) > before:
        return None
    return Leaf(path, rule, parts, tuple(new.shape), np.dtype(new.dtype), tuple(source[parts[0].source].shape))


def _parts(where: rules.StackedPath, plan: Plan, rule: str) -> tuple[Part, ...]:
    parts = []
    for block in range(plan.target_layout.segments[where.segment].repeats):
        layer = plan.target_layout.layer(where.segment, block, where.slot)
        entry = plan.entries[layer]
        segment, source_block, slot = plan.source_layout.position(entry.source)
        name = str(where._replace(segment=segment, slot=slot))
        coefficient = float(entry.copy == 1) if rule in rules.NEUTRAL else entry.coefficient
        parts.append(Part(name, source_block, coefficient, layer))
    return tuple(parts)


def _unfit(name: str, old: ShapeDtypeStruct, path: str, new: ShapeDtypeStruct, rule: str,
           blocks: int | None) -> list[str]:
    """What keeps source tensor `name` from filling target tensor `path` (`blocks` None: not stacked)."""
    wrong = []
    want = tuple(old.shape) if blocks is None else (blocks, *old.shape[1:])
    if tuple(new.shape) != want:
        wrong.append(f"source tensor {name} of shape {tuple(old.shape)} gives shape {want}, "
                     f"target tensor {path} has {tuple(new.shape)}")
    floating = [bool(jnp.issubdtype(side.dtype, jnp.floating)) for side in (old, new)]
    computed = rule in (rules.SCALED, rules.OUTPUT, rules.LAST_NORM, rules.GAIN)
    if floating[0] != floating[1] or (computed and not floating[0]):
        wrong.append(f"source tensor {name} is {old.dtype}, target tensor {path} is {new.dtype}; "
                     + ("both must be floating" if computed else "one is floating, the other is not"))
    return wrong


def _unused(source: Abstract, used: set[str], plan: Plan) -> tuple[tuple[str, ...], list[str]]:
    """Source tensors without a place, split into dropped ones (halting; layers not in the plan) and left-overs."""
    positions = [plan.source_layout.position(entry.source) for entry in plan.entries]
    planned = {(segment, slot) for segment, _, slot in positions}
    dropped: list[str] = []
    left_over: list[str] = []
    for path in sorted(set(source) - used):
        where = rules.stacked_path(path)
        absent = where is not None and (where.segment, where.slot) not in planned
        (dropped if absent or rules.rule(path) == rules.DROPPED else left_over).append(path)
    return tuple(dropped), left_over


def _without_carrier(leaves: Iterable[Leaf], plan: Plan, carry: str) -> list[str]:
    carried = {(where.segment, where.slot) for leaf in leaves
               if leaf.rule in _CARRIERS[carry] and (where := rules.stacked_path(leaf.path))}
    return [f"target layers params/segment{segment}/layer{slot} have no tensor of rule {_CARRIERS[carry][0]!r}, "
            f"so carry {carry!r} would lose their coefficients"
            for segment, part in enumerate(plan.target_layout.segments) for slot in range(len(part.pattern))
            if (segment, slot) not in carried]


def grow_block(leaf: Leaf, block: int, source_slice: Array | np.ndarray, *, carry: str, noise_std: float,
               seed: int) -> Array:
    """Block `block` of a target tensor from its source block's slice: c * (W + N), N of standard deviation noise_std.

    For a tensor of the whole model the slice is the tensor and `block` is 0. Returns the leaf's dtype; float32 inside.
    """
    # Off a mesh one program serves all tensors of about one size: that of the noise takes seconds to compile.
    on_mesh, size = not jax.typeof(source_slice).sharding.mesh.empty, source_slice.size
    values = source_slice if on_mesh else source_slice.reshape(-1)
    if not on_mesh and size < _PADDED and _noisy(leaf, carry, noise_std):
        values = jnp.pad(values, (0, _program_size(size) - size))
    grown = grow_slice(leaf, block, values, carry=carry, noise_std=noise_std, seed=seed)
    return grown[:size].reshape(source_slice.shape) if grown.size > size else grown.reshape(source_slice.shape)


_PADDED = 2**16  # smaller blocks are filled up with zeros


def _program_size(size: int) -> int:
    """The smallest of 64, 256, 1024, ... that is no less than `size`."""
    power = 64
    while power < size:
        power *= 4
    return power


def _noisy(leaf: Leaf, carry: str, noise_std: float) -> bool:
    return rules.treatment(leaf.rule, carry).noisy and noise_std > 0


def grow_slice(leaf: Leaf, block: int, values: Array | np.ndarray, start: int = 0, *, carry: str, noise_std: float,
               seed: int) -> Array:
    """The part of `grow_block` that begins at flat position `start` of the block, from that part of its source."""
    scaled, noisy = rules.treatment(leaf.rule, carry).scaled, _noisy(leaf, carry, noise_std)
    if leaf.rule in rules.NEUTRAL and not leaf.parts[block].coefficient:
        return jnp.full_like(values, rules.NEUTRAL[leaf.rule], leaf.dtype)
    if not noisy and not scaled:
        return jnp.asarray(values, leaf.dtype)
    key = noise_on_devices.limbs(noise_key(leaf, block, seed))
    coefficient = leaf.parts[block].coefficient if scaled else 1.0  # of which a product is exact
    return _slice(values, key, np.uint32(start), np.float32(coefficient), noise.step(noise_std), dtype=leaf.dtype,
                  noisy=noisy)


def noise_key(leaf: Leaf, block: int, seed: int) -> np.ndarray:
    """What the noise of a block depends on beside positions: seed, the tensor's name in its layer, target layer."""
    stacked = rules.stacked_path(leaf.path)
    return noise.key_of(seed, stacked.name if stacked else leaf.path, leaf.parts[block].layer or 0)


@functools.partial(jax.jit, static_argnames=("dtype", "noisy"))
def _slice(weights: Array, key: Array, start: Array, coefficient: Array, noise_step: Array, *, dtype: np.dtype,
           noisy: bool) -> Array:
    """coefficient * (weights + noise at positions start, start + 1, ...)."""
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    value = weights.astype(wide)
    if noisy:
        positions = start + noise_on_devices.positions(weights.shape, jax.typeof(weights).sharding)
        value += noise_on_devices.at(key, positions, noise_step).astype(wide)
    return (value * coefficient.astype(wide)).astype(dtype)


def grow_leaf(leaf: Leaf, sources: Mapping[str, Array | np.ndarray], *, carry: str, noise_std: float,
              seed: int) -> Array:
    """A whole target tensor from the source tensors by path: `grow_block` for every block, stacked along axis 0."""
    if not leaf.stacked:
        return grow_block(leaf, 0, sources[leaf.path], carry=carry, noise_std=noise_std, seed=seed)
    slices = [grow_block(leaf, index, jax.lax.index_in_dim(jnp.asarray(sources[part.source]), part.block or 0,
                                                           keepdims=False),
                         carry=carry, noise_std=noise_std, seed=seed)
              for index, part in enumerate(leaf.parts)]
    return jnp.stack(slices)


def grow(tree: Mapping[str, Any], plan: Plan, source_config: ModelConfig | None = None, *, carry: str = "gain",
         noise_std: float = 0.0, seed: int = 0, dtype: str | None = None) -> dict[str, Any]:
    """The grown tree {"params", "statistics"} of a source tree; runs under `jax.jit` and `jax.eval_shape`.

    With `source_config` the result is what the model code declares for the child, in its `dtype`; without, the tensors
    follow from the source's own and keep their dtypes. Raises `Refused` as `match` and `target_config` do, for noise
    that is negative or not finite, for a seed outside 0..2^32-1, and for a dtype without a config.
    """
    rules.check_noise(noise_std, seed)
    if dtype is not None and source_config is None:
        raise Refused(f"dtype {dtype} needs the source's config, which says which tensors stay float32")
    source = abstract(tree)
    target = target_abstract(source, plan) if source_config is None else child_abstract(source_config, plan, dtype)
    matched = match(source, target, plan, carry)
    flat = flatten(tree)
    return nest({leaf.path: grow_leaf(leaf, flat, carry=carry, noise_std=noise_std, seed=seed)
                 for leaf in matched.leaves})
