"""What the answer is read from: a decode cache taken apart into recurrent state and all else, put together anew.

A prompt is read up to a cut; what the model remembers then is its cache. A twin, of which only the asked fact's colour
differs, has another. The rest of the prompt and its question are read from one of

    intact            the prompt's own cache
    state swapped     the twin's recurrent states, all else the prompt's: does the answer follow the state?
    rest swapped      the twin's keys, values and windows, the prompt's recurrent states
    state zeroed      recurrent states 0, all else its own
    rest hidden       keys and values that nobody sees, windows of 0, the prompt's recurrent states
    local path off    its own cache, the local path of S layers at strength 0 from the cut on

- Recurrent states are those of D (and B) layers; all else is the short windows of D, the keys and values of S, G, A.
- A state swapped with itself changes no bit, and state and rest swapped together are the twin, bit for bit: tests.
- Prompts are filled on the left, and what is read on from a cache on the right, with padding that no layer sees: one
  program reads them at every length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from experiments.recall_study.needles import ANSWER_AFTER, Test
from gt_jax.configs.model import ModelConfig
from gt_jax.models.language_model import LanguageModel, apply_network, empty_cache
from gt_jax.typing import Tree

STATES = ("state", "resolvent")
"""Leaves of a cache that are recurrent states."""
INTACT, OFF = "intact", "local path off"
SWAPPED, REST, ZEROED, HIDDEN = "state swapped", "rest swapped", "state zeroed", "rest hidden"
MODES = (INTACT, SWAPPED, REST, ZEROED, HIDDEN, OFF)


def swapped(mine: Tree, twins: Tree, states: bool) -> Tree:
    """`mine` with the twin's recurrent states, or with all else of the twin's."""

    def one(path: tuple[Any, ...], own: Array, other: Array) -> Array:
        return other if (_name(path) in STATES) == states else own

    return jax.tree_util.tree_map_with_path(one, mine, twins)


def zeroed(cache: Tree) -> Tree:
    """The cache with recurrent states of 0, as before the first token."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if _name(path) in STATES else leaf, cache)


def hidden(cache: Tree) -> Tree:
    """The cache with nothing but its recurrent states: windows of 0, keys and values of no document."""

    def layer(one: Tree) -> Tree:
        if not any(name in one for name in STATES):
            return {**one, "segments": jnp.full_like(one["segments"], -1)}
        return {name: leaf if name in STATES or jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.zeros_like(leaf)
                for name, leaf in one.items()}  # fmt: skip

    return {name: part if name == "position" else {slot: layer(one) for slot, one in part.items()}
            for name, part in cache.items()}  # fmt: skip


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2]


def without_local_path(config: ModelConfig) -> ModelConfig:
    """The model with the local path of its S layers at strength 0."""
    return config if config.sliding is None else config.replace(sliding=config.sliding.replace(evaluation_scale=0.0))


def modes_of(config: ModelConfig) -> tuple[str, ...]:
    """The modes that say something of a layout."""
    return tuple(mode for mode in MODES if mode != OFF or "S" in config.depth.types)


class Reader:
    """Reads prompts of one model up to a cut, and from caches put together anew; every program is compiled once.

    Variables have a leading axis of seeds. `length` is the longest row with its question.
    """

    def __init__(self, config: ModelConfig, length: int) -> None:
        self._config, self._length = config, length

    def remembered(self, variables: Tree, prompts: Int32[np.ndarray, "n t"]) -> Tree:
        """The caches after the prompts, by seed."""
        return _reader(self._config, self._length)(variables, *_filled(prompts, self._length))

    def logits(self, variables: Tree, caches: Tree, rest: Int32[np.ndarray, "n t"], mode: str = INTACT
               ) -> Float[np.ndarray, "s n vocab"]:
        """The logits of what follows the rest of the rows, read on from the caches."""
        config = without_local_path(self._config) if mode == OFF else self._config
        width = rest.shape[1] if rest.shape[1] <= ANSWER_AFTER + 1 else self._length
        filled = ((0, 0), (0, width - rest.shape[1]))  # on the right: padding at the end of a row writes nothing
        rows = np.pad(rest, filled), np.pad(np.ones_like(rest), filled)
        return np.asarray(_follower(config)(variables, caches, *rows, rest.shape[1] - 1))

    def by_mode(self, variables: Tree, test: Test, cut: int, modes: tuple[str, ...]
                ) -> dict[str, Float[np.ndarray, "s n vocab"]]:
        """The logits of the answers by mode, the prompts cut before token `cut`."""
        mine, twins = (self.remembered(variables, rows[:, :cut]) for rows in (test.prompts, test.twins))
        rest = np.concatenate([test.prompts[:, cut:], test.questions], axis=1)
        caches: dict[str, Callable[[], Tree]] = {
            INTACT: lambda: mine, OFF: lambda: mine, ZEROED: lambda: zeroed(mine), HIDDEN: lambda: hidden(mine),
            SWAPPED: lambda: swapped(mine, twins, True), REST: lambda: swapped(mine, twins, False),
        }  # fmt: skip
        return {mode: self.logits(variables, caches[mode](), rest, mode) for mode in modes}


def _filled(rows: Int32[np.ndarray, "n t"], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled from the left, and their segment ids."""
    width = ((0, 0), (length - rows.shape[1], 0))
    return np.pad(rows, width), np.pad(np.ones_like(rows), width)


@functools.lru_cache(maxsize=4)
def _reader(config: ModelConfig, length: int) -> Callable[..., Tree]:
    network = LanguageModel(config)

    def read(variables: Tree, tokens: Array, segments: Array) -> Tree:
        start = empty_cache(config, tokens.shape[0], 2 * length)
        return apply_network(network, variables, tokens, segments, cache=start).cache

    return jax.jit(jax.vmap(read, in_axes=(0, None, None)))


@functools.lru_cache(maxsize=8)
def _follower(config: ModelConfig) -> Callable[..., Array]:
    network = LanguageModel(config)

    def follow(variables: Tree, cache: Tree, tokens: Array, segments: Array, last: Array) -> Array:
        return apply_network(network, variables, tokens, segments, cache=cache).logits[:, last]

    return jax.jit(jax.vmap(follow, in_axes=(0, 0, None, None, None)))
