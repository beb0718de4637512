"""Trees by path: `{"a": {"b": x}}` as `{"a/b": x}`, what can be stored, how two trees differ, and a hash of one."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Flat = dict[str, Any]


def flatten(tree: Any) -> Flat:
    """`{"a": {"b": x}}` -> `{"a/b": x}`; raises ValueError for keys that are no plain names and for a bare leaf."""
    flat = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys]
        if not names or any(not name or set(name) & set("/.") for name in names):
            raise ValueError(f"tree path {'/'.join(names)!r}: keys must be non-empty and free of '/' and '.'")
        flat["/".join(names)] = leaf
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten` for nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def storable(tree: Any) -> Flat:
    """Arrays by path; Python numbers become 0-d arrays. Raises ValueError that lists what cannot be stored."""
    leaves, problems = flatten(tree), []
    for name, leaf in leaves.items():
        if isinstance(leaf, (bool, int, float)):
            leaves[name] = np.asarray(leaf, jax.dtypes.canonicalize_dtype(type(leaf)))
        elif isinstance(leaf, np.generic):
            leaves[name] = np.asarray(leaf)
        elif not isinstance(leaf, (np.ndarray, jax.Array)):
            problems.append(f"{name} is a {type(leaf).__name__}, not an array")
        elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            problems.append(f"{name} is a random key; save its seed, or jax.random.key_data of it")
        elif leaf.size == 0:
            problems.append(f"{name} of shape {leaf.shape} has no elements")
    if problems:
        raise ValueError("\n".join(["this tree cannot be stored:", *problems]))
    return leaves


def differences(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """One line for each wanted leaf that is missing, or stored with another shape or dtype."""
    lines = []
    for name, leaf in wanted.items():
        if name not in stored:
            lines.append(f"{name} is not in the checkpoint")
        elif (tuple(leaf.shape), leaf.dtype) != (stored[name].shape, stored[name].dtype):
            there = f"{stored[name].dtype}{list(stored[name].shape)}"
            lines.append(f"{name} is {there} in the checkpoint, {leaf.dtype}{list(leaf.shape)} here")
    return lines


class LeafDigest:
    """SHA-256 of one leaf, its path, shape, dtype and bytes in C order, and `crc32` of its bytes.

    The values come in parts.
    """

    def __init__(self, name: str, leaf: jax.ShapeDtypeStruct) -> None:
        self._hash = hashlib.sha256(f"{name} {tuple(leaf.shape)} {leaf.dtype}\n".encode())
        self.crc32 = 0

    def update(self, values: np.ndarray) -> None:
        """The next values."""
        data = values.reshape(-1).view(np.uint8).data
        self._hash.update(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    def hexdigest(self) -> str:
        """The digest of all values so far."""
        return self._hash.hexdigest()


def combine_digests(digests: Mapping[str, str]) -> str:
    """The content hash of a tree from its leaves' digests, in whichever order they were made."""
    return hashlib.sha256("\n".join(digests[name] for name in sorted(digests)).encode()).hexdigest()
