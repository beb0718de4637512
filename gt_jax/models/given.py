"""What a caller of the library hands to a model, checked before anything runs.

A gather reads an id that no table has as the nearest one, a cast takes 5.7 as 5, and a layer that the config does not
name is not read: each would be, without a word, a number of another model or another text.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.errors import Refused, refuse_all
from gt_jax.models.language_model import abstract, empty_cache
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.models.layers.memory_stream import Memory
from gt_jax.typing import Tokens, Tree

HEADING = "the model cannot run:"
_WHOLE = Rules(batch=None, embed=None, heads=None, mlp=None, vocab=None, experts=None)  # shapes alone are asked for
_SHOWN = 20  # tensors that do not fit: beyond them it is another model


def checked_tokens(
    tokens: ArrayLike | Sequence[Any], vocab: int, segment_ids: ArrayLike | Sequence[Any] | None = None
) -> tuple[Tokens, Tokens | None]:  # fmt: skip
    """Tokens [b, t], and segments of the same shape where they are given, as int32; raises `Refused` for others."""
    given = {"tokens": tokens} | ({} if segment_ids is None else {"segment_ids": segment_ids})
    ids = _checked(given, {"tokens": (0, vocab)})
    return ids["tokens"], ids.get("segment_ids")


def checked_batch(batch: Mapping[str, Any], vocab: int) -> dict[str, Tokens]:
    """{"tokens", "targets", "segment_ids"} as int32 [b, t]; a target below 0 is none. Raises `Refused` for others."""
    needed = ("tokens", "targets", "segment_ids")
    missing = [name for name in needed if name not in batch]
    if missing:
        raise Refused(f"the batch has no {' and no '.join(missing)}; {', '.join(needed)} are needed, or tokens alone")
    lowest = -(2**31)
    return _checked({name: batch[name] for name in needed}, {"tokens": (0, vocab), "targets": (lowest, vocab)})


def _checked(given: Mapping[str, Any], bounds: Mapping[str, tuple[int, int]]) -> dict[str, Tokens]:
    """All as int32 of the shape of `tokens`, from bounds[0] up and below bounds[1]; others are 0 or more."""
    arrays = {name: as_array(one, name) for name, one in given.items()}
    shape = tuple(arrays["tokens"].shape)
    wrong = [line for name, ids in arrays.items() for line in wrong_ids(ids, name, *bounds.get(name, (0, 2**31)))]
    wrong += [f"{name} is of shape {tuple(ids.shape)}; tokens is of {shape}" for name, ids in arrays.items()
              if not wrong and tuple(ids.shape) != shape]  # fmt: skip
    refuse_all(wrong, HEADING)
    return {name: jnp.asarray(ids, jnp.int32) for name, ids in arrays.items()}


def as_array(given: Any, name: str) -> jax.Array | np.ndarray:
    """Lists as an array, arrays as they are; raises `Refused` for rows of several lengths."""
    if isinstance(given, (jax.Array, np.ndarray)):
        return given
    try:
        return np.asarray(given)
    except ValueError as error:
        raise Refused(f"{name} is no array [b, t]: {error}; pad rows to one length") from error


def wrong_ids(ids: jax.Array | np.ndarray, name: str, least: int, end: int) -> list[str]:
    """Why these are no whole numbers [b, t] of `least` … `end` - 1: one line, or none.

    Of arrays that are traced, or lie on other processes' devices too, dtype and shape alone are looked at.
    """
    if not np.issubdtype(ids.dtype, np.integer):
        return [f"{name} is of dtype {ids.dtype}; whole numbers are needed, int32"]
    if ids.ndim != 2 or 0 in ids.shape:
        return [f"{name} is of shape {tuple(ids.shape)}; [b, t] is needed, of one row and one token at least"]
    if not _is_here(ids):
        return []
    here = np.asarray(ids)  # by NumPy: inside a trace JAX would trace the minimum of a constant too
    low, high = int(here.min()), int(here.max())
    if low >= least and high < end:
        return []
    right = f"up to {end - 1}" if least < 0 else f"{least} … {end - 1}"
    return [f"{name} has ids in {low} … {high}; the model's are {right}"]


def _is_here(array: jax.Array | np.ndarray) -> bool:
    """Whether its values can be looked at."""
    return not isinstance(array, jax.core.Tracer) and (isinstance(array, np.ndarray) or array.is_fully_addressable)


def wrong_variables(config: ModelConfig, variables: Tree) -> list[str]:
    """How {"params", "statistics"} differ from what `initialise` gives for the config, in paths and shapes."""
    wanted = {path: shape for path, (shape, _) in _tensors(config).items()}
    roots = sorted({path.partition("/")[0] for path in wanted})
    if not isinstance(variables, Mapping) or not set(roots) <= set(variables):
        keys = list(variables) if isinstance(variables, Mapping) else type(variables).__name__
        return [f"variables is {keys}; the mapping of {' and '.join(roots)} is needed, as `initialise` and `load` give"]
    return _differences(wanted, _by_path({root: variables[root] for root in roots}))


def wrong_cache(config: ModelConfig, cache: Tree, rows: int, tokens: int) -> list[str]:
    """Why this is no `empty_cache` of the config for so many rows, or has no room for so many tokens more.

    Where the cache is traced, how much of it is full is not known: then room for the tokens themselves is looked at.
    """
    if not isinstance(cache, Mapping) or "position" not in cache:
        return ["cache is none; `empty_cache(config, b, length)` makes one, and each output has the next"]
    found = _by_path(cache)
    rooms = [found[path][-1] for path in _rooms(config) if found.get(path)]
    room = min(rooms, default=tokens)
    wanted = _by_path(jax.eval_shape(lambda: empty_cache(config, rows, room)))
    wrong = [f"cache: {line}" for line in _differences(wanted, found)]
    if wrong or not rooms:
        return wrong
    full = _full(cache)
    if full + tokens <= room:
        return []
    return [f"the cache has room for {room} tokens, {full} are in it, and these are {tokens} more; make it longer"]


def wrong_chunk(config: ModelConfig, cache: Tree, tokens: int) -> list[str]:
    """Why these tokens, behind those in the cache, are no chunk of a model with a memory stream."""
    if config.memory is None:
        return []
    full = _full(cache) if isinstance(cache, Mapping) and "position" in cache else 0
    if full + tokens <= config.memory.chunk:
        return []
    behind = f" behind {full} in the cache" if full else ""
    return [f"there are {tokens} tokens{behind}; the model reads chunks of memory.chunk {config.memory.chunk}. Give "
            "each by itself, with memory=output.memory of the one before and an empty cache; `evaluate`, `measure` and "
            "`sample` do so"]  # fmt: skip


def wrong_padding(segments: Tokens | None) -> list[str]:
    """Why these segments cannot go into a cache: positions, and S layers, would count padding as tokens."""
    if segments is None or not _is_here(segments) or np.all(np.asarray(segments) > 0):
        return []
    return ["segment_ids have padding (0), which a cache would count as tokens; give rows of one length, or one by one"]


def wrong_mtp(config: ModelConfig, cache: Tree) -> list[str]:
    """Why nobody can predict the token after the next: the model has no such layer, or that one keeps no cache."""
    if config.mtp is None:
        return ["mtp is asked for; the model has no multi-token prediction (config.mtp is None)"]
    if cache is not None:
        return ["mtp with a cache: its layer keeps none, and would see these tokens alone; give whole rows"]
    return []


def wrong_memory(config: ModelConfig, memory: Any, rows: int) -> list[str]:
    """Why this is no memory that a chunk of so many rows left."""
    if config.memory is None:
        return ["memory is given; the model has no memory stream (config.memory is None)"]
    if not isinstance(memory, Memory):
        return [f"memory is a {type(memory).__name__}; `.memory` of the output of the chunk before is needed"]
    wanted = {"value": (rows, config.width), "segment": (rows,)}
    return [f"memory.{name} is of shape {np.shape(getattr(memory, name))}; {shape} is needed, that of the chunk before"
            for name, shape in wanted.items() if np.shape(getattr(memory, name)) != shape]  # fmt: skip


def wrong_passes(config: ModelConfig, control: Any) -> list[str]:
    """Why the passes that are fixed are none of this model: of too many layers, more than a layer runs, or of layers
    whose tokens go by their gates."""
    if not isinstance(control, PassControl):
        return [f"control is a {type(control).__name__}; `fixed_passes(2)` makes one, or None leaves it to the gates"]
    forced, layers = as_array(control.forced, "control.forced"), len(config.depth)
    by_gates = "config.gated_copies" if config.gated_copies is not None else "config.exit"
    gated = config.gated_copies is not None or config.exit is not None
    if gated and _is_here(forced) and np.any(np.asarray(forced)):
        return [f"passes are fixed; with {by_gates} the gates say which layers a token runs, and nothing else does"]
    if forced.ndim and forced.shape != (layers,):
        return [f"passes are of shape {forced.shape}; one number is needed, or {layers}, one a layer"]
    most = 1 if config.adaptive is None else config.adaptive.max_passes
    if not _is_here(forced) or np.max(np.asarray(forced)) <= most:
        return []
    return [f"passes are {np.asarray(forced).tolist()}; a layer of this model runs {most} times at most"]


def _full(cache: Tree) -> int:
    """The most tokens that a row of the cache holds; 0 where that is traced."""
    return int(np.max(np.asarray(cache["position"]))) if _is_here(cache["position"]) else 0


def _rooms(config: ModelConfig) -> list[str]:
    """Where a cache says how long its keys' room is: in the layers that keep the keys of all tokens."""
    return [f"segment{index}/layer{slot}/segments" for index, segment in enumerate(config.depth.segments)
            for slot, kind in enumerate(segment.pattern) if kind in "AG"]  # fmt: skip


def _differences(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    lines = [f"{path} is missing; the config has it, of shape {shape}" for path, shape in wanted.items()
             if path not in found]  # fmt: skip
    lines += [f"{path} is not in the config" for path in found if path not in wanted]
    lines += [f"{path} is of shape {found[path]}; the config has {shape}" for path, shape in wanted.items()
              if found.get(path, shape) != shape]  # fmt: skip
    return _first(lines)


def wrong_dtypes(config: ModelConfig, variables: Tree) -> list[str]:
    """Which tensors, of the config's paths, have a dtype that loses something where it is stored as the config says."""
    found = {path: np.dtype(leaf.dtype) for path, leaf in _leaves(variables)}
    lines = [f"{path} is {found[path]}; the config stores {wanted}, which does not hold its values"
             for path, (_, wanted) in _tensors(config).items() if not _held(found[path], wanted)]  # fmt: skip
    return _first(lines)


def stored_as(config: ModelConfig, variables: Tree) -> Tree:
    """Variables that fit the config, in its dtypes."""
    wanted = _tensors(config)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if leaf.dtype == wanted[_name(path)][1] else leaf.astype(wanted[_name(path)][1]),
        {root: variables[root] for root in {path.partition("/")[0] for path in wanted}})  # fmt: skip


def _held(given: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    return bool(jnp.promote_types(given, wanted) == wanted)


@functools.lru_cache(maxsize=16)
def _tensors(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    return {path: (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in _leaves(abstract(config, _WHOLE))}


def _leaves(tree: Tree) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _by_path(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {path: tuple(np.shape(leaf)) for path, leaf in _leaves(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _first(lines: list[str]) -> list[str]:
    return [*lines[:_SHOWN], *([f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])]
