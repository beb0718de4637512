"""An optimizer's state that begins with the moments a checkpoint holds, of the same model or of a grown one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.folders import StrPath
from gt_jax.checkpoints.moments import Moments, stored_moments
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.errors import refuse_all
from gt_jax.typing import Tree

_NODE = re.compile(r"(?:.+/)?(mu|nu|copies)/(.+)")


def lacking_moments(parameters: Tree, stored: Mapping[str, Any]) -> list[str]:
    """What keeps moments from being carried: the parameters whose second moment is not stored in their shape."""
    found = stored_moments(stored)
    if found is None:
        return ["it holds no second moments of an optimizer"]
    return [f"it holds no second moment of {name} in its shape" for name in found.lacking(flatten(parameters), stored)]


def carried_moments(fresh: Tree, parameters: Tree, start: StrPath, stored: Mapping[str, Any]) -> Tree:
    """The optimizer's state `fresh` of `parameters` with the moments of the checkpoint `start`, laid out as in `fresh`.

    First moments that are not there stay 0; float32 copies of narrower weights that are not there are those weights.
    `stored` are the checkpoint's tensors. Raises `Refused` where a second moment is missing.
    """
    refuse_all(lacking_moments(parameters, stored), f"the moments of {start} cannot be carried; take --moments fresh:")
    found = stored_moments(stored)
    assert found is not None  # else they are lacking
    leaves = flatten({"optimizer": fresh})
    sources = {path: name for path in leaves if (name := _source(path, found)) is not None}
    wanted = {name: jax.ShapeDtypeStruct(leaves[path].shape, leaves[path].dtype, sharding=leaves[path].sharding)
              for path, name in sources.items()}
    read = flatten(checkpoint.load(start, nest(wanted)))
    # a copy each: the count is one tensor there and several here, and the step donates every one of them
    values = [jnp.copy(read[sources[path]]) if path in sources else leaf for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(fresh), values)


def _source(path: str, found: Moments) -> str | None:
    """The stored tensor that a leaf of the state begins with; None leaves it as it is."""
    if path.endswith("/count"):
        return found.updates
    node = _NODE.fullmatch(path)
    names = {"mu": found.first, "nu": found.second, "copies": found.copies}
    return None if node is None else names[node[1]].get(node[2])
