"""The presets at their true size, through shapes alone: exact parameter counts, every tensor's place on a mesh.

After a wanted change, write the golden files anew: PYTHONPATH=. python tests/configs/test_presets.py
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jax
import pytest

from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs import presets
from gt_jax.devices.sharding import make_mesh
from gt_jax.models.language_model import abstract

GOLDEN = Path(__file__).parent / "golden"
COUNTS = {"3b": 3_914_051_889, "8b": 8_309_921_685, "3b_table": 4_417_364_273}


@functools.cache
def leaves(name: str) -> dict[str, jax.ShapeDtypeStruct]:
    with jax.set_mesh(make_mesh(data=1, fsdp=2, expert=2, tensor=2)):
        return flatten(abstract(presets.preset(name)))


GROUNDTHINK = {  # the published counts; our gains, one a layer, come on top
    "groundthink_d": 6_638_788, "groundthink_dd": 14_378_896, "groundthink_dddd": 37_697_344,
    "groundthink_ddddds": 17_583_212, "groundthink_dsds": 4_993_368,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUNDTHINK)
def test_the_groundthink_hybrids_have_their_published_counts(name):
    config = presets.preset(name)
    shapes = jax.tree.leaves(abstract(config)["params"])
    assert sum(math.prod(leaf.shape) for leaf in shapes) == GROUNDTHINK[name] + len(config.depth)


HYBRIDS = {  # what transformers counts in models of their default configs; our gains come on top
    "qwen3_5_9b": 8_953_803_264, "qwen3_5_35b_a3b": 34_660_610_688, "qwen3_next_80b_a3b": 79_674_391_296,
    "olmo_hybrid_7b": 7_430_870_688,
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_public_hybrids_have_the_counts_of_their_shapes(name):
    c = presets.preset(name)
    d, a, m = c.deltanet, c.attention, c.moe
    keys, values, queries = d.heads * d.key_width, d.value_heads * d.value_width, a.heads * a.head_width
    linear = c.width * (2 * keys + 2 * values + 2 * d.value_heads) + d.conv_width * (2 * keys + values)
    linear += 2 * d.value_heads + d.value_width + values * c.width
    norms = {"none": 0, "head": 2 * a.head_width, "all": queries + a.kv_heads * a.head_width}[a.qk_norm]
    full = c.width * (queries * (2 + a.gate) + 2 * a.kv_heads * a.head_width) + norms
    mlp = 3 * c.width * c.mlp_width
    if m is not None:
        mlp += m.experts * 3 * c.width * m.expert_width + c.width * (m.experts + 1)
    layers = {"D": linear + mlp + 2 * c.width, "A": full + mlp + 2 * c.width}
    assert sum(map(layers.get, c.depth.types)) + 2 * c.vocab * c.width + c.width == HYBRIDS[name]


def parameters(name: str, under: str = "params/") -> int:
    return sum(math.prod(leaf.shape) for path, leaf in leaves(name).items() if path.startswith(under))


def text(name: str) -> str:
    """One line a tensor: path, shape, dtype, partition."""
    lines = []
    for path, leaf in leaves(name).items():
        lines.append(f"{path} {'x'.join(map(str, leaf.shape)) or '-'} {leaf.dtype} {tuple(leaf.sharding.spec)}")
    return "\n".join(sorted(lines)) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_exact(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.slow
def test_the_parts_of_3b_have_the_sizes_of_the_reference():
    blocks = 2
    assert parameters("3b", "params/segment0/layer0/") == blocks * (361_943_403 + 753 + 1)
    assert parameters("3b", "params/segment0/layer3/") == blocks * (379_461_727 + 753 + 1)
    assert parameters("3b", "params/segment0/layer0/halting/") == blocks * 753
    assert parameters("3b", "params/mtp/") == 413_016_159
    gains = [leaf for path, leaf in leaves("8b").items() if path.endswith("/gain")]
    assert sum(leaf.size for leaf in gains) == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_every_tensor_lies_where_the_golden_file_says(name):
    assert text(name) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.slow
def test_large_tensors_are_cut_over_every_axis_that_can_hold_them():
    with jax.set_mesh(make_mesh(data=1, fsdp=2, expert=2, tensor=2)):
        whole = [(path, leaf.shape) for path, leaf in leaves("8b").items()
                 if leaf.size * leaf.dtype.itemsize > 2**30 and not any(leaf.sharding.spec)]
    assert whole == []


@pytest.mark.parametrize("name", ["tiny_3b", "tiny_8b"])
def test_tiny_forms_have_every_tensor_of_the_large_ones(name):
    # the same names and ranks: what holds for the tiny model's tensors holds for the large one's
    tiny, large = flatten(abstract(presets.preset(name))), leaves(name.removeprefix("tiny_"))
    assert {path: leaf.ndim for path, leaf in tiny.items()} == {path: leaf.ndim for path, leaf in large.items()}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    GOLDEN.mkdir(exist_ok=True)
    for preset in COUNTS:
        (GOLDEN / f"{preset}.txt").write_text(text(preset))
