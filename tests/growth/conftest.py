"""The checkpoint that is grown in the tests of growing from checkpoint to checkpoint, made once."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint, orbax_store
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.growth import stream, transform
from gt_jax.models import language_model
from tests.growth.stream_case import CONFIG, OPTIONS, PLAN, QUIET, Case

CHILD_ABSTRACT = functools.cache(transform.child_abstract)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """What `small_and_once` says, as long as it is open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "child_abstract", CHILD_ABSTRACT)
        patch.setattr(orbax_store, "CHUNK", 512)
        patch.setattr(stream, "SECONDS", 0.0)  # a line of progress for every source tensor
        yield


@pytest.fixture(scope="module")
def small_and_once() -> Iterator[None]:
    """The model code is asked once what a child's tensors are; small tensors are stored in chunks, too."""
    with patched():
        yield


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A training checkpoint of random values, and what the pure transform makes of it."""
    with patched():
        return made(tmp_path_factory.mktemp("case"))


def made(folder: Path) -> Case:
    random = np.random.default_rng(3)
    tree = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), language_model.abstract(CONFIG))
    training = {**tree, "optimizer": ({"mu": np.full((3,), np.nan)}, ()), "step": 12, "price": 0.5}
    metadata = {"config": CONFIG.to_json(), "kind": "train", "step": 12, "data": {"position": 4}}
    checkpoint.save(folder / "source", training, metadata)
    stream.grow_checkpoint(folder / "source", folder / "target", plan=PLAN, **OPTIONS)
    grown = jax.tree.map(np.asarray, transform.grow(tree, PLAN, CONFIG, **OPTIONS))
    stream.grow_checkpoint(folder / "source", folder / "quiet", plan=PLAN, **QUIET)
    hashes = [checkpoint.content_hash(folder / name) for name in ("target", "quiet")]
    return Case(folder / "source", tree, flatten(grown), *hashes)
