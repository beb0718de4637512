"""What strangers hand to the library: numbers of another model or text are refused, not computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gt_jax
from gt_jax.configs.model import AttentionConfig, ExitConfig, MemoryConfig, MTPConfig
from gt_jax.errors import Refused
from gt_jax.growth import repetition
from gt_jax.models.given import wrong_mtp, wrong_passes
from gt_jax.models.language_model import LanguageModel, abstract, empty_cache, fixed_passes, free_passes
from gt_jax.models.layers.memory_stream import no_memory
from gt_jax.models.memory_chunks import forward_rows
from tests.support import small_model

CONFIG = gt_jax.preset("one_layer").replace(width=16, mlp_width=16)
TOKENS = np.arange(32).reshape(2, 16)
ONES = np.ones_like(TOKENS)


@pytest.fixture(scope="module")
def variables():
    return gt_jax.initialise(CONFIG, seed=0)


def batch(**changed):
    return {"tokens": TOKENS, "targets": TOKENS, "segment_ids": ONES} | changed


def test_tokens_that_are_none_are_refused(variables):
    """A table has no row 1000 and none -7; 5.7 is not 5; 2**32 does not wrap to 0; shapes are said in one sentence."""
    def refused(call, words):
        with pytest.raises(Refused, match=words):
            call()

    def forward(*arguments):
        return lambda: gt_jax.forward(CONFIG, variables, *arguments)

    def measure(*batches):
        return lambda: gt_jax.measure(CONFIG, variables, list(batches))

    for wrong, words in (
        (TOKENS + 1000, "1000 … 1031; the model's are 0 … 263"), (TOKENS - 7, "-7 … 24"), (TOKENS + 2**32, "4294"),
        (TOKENS + 0.7, "dtype float64"), (TOKENS[0], r"shape \(16,\); \[b, t\]"), (TOKENS[None], r"shape \(1, 2, 16\)"),
        (TOKENS[:0], r"shape \(0, 16\)"), (TOKENS[:, :0], r"shape \(2, 0\)"), ([[1, 2], [3]], "pad rows"),
    ):  # fmt: skip
        for call in (forward(wrong), measure(wrong), measure(TOKENS, batch(tokens=wrong)),
                     lambda wrong=wrong: gt_jax.sample(CONFIG, variables, wrong, 1)):  # fmt: skip
            refused(call, words)
    refused(forward(TOKENS, ONES[:, 1:]), r"segment_ids is of shape \(2, 15\); tokens is of \(2, 16\)")
    refused(measure(batch(targets=TOKENS + 1000)), "targets has ids in 1000 … 1031; the model's are up to 263")
    refused(measure({"tokens": TOKENS}), "no targets and no segment_ids")
    refused(measure(), "there are no batches")
    refused(lambda: gt_jax.sample(CONFIG, variables, TOKENS, 3.0), "length is 3.0")
    counts = gt_jax.measure(CONFIG, variables, [TOKENS[:, :1].tolist(), batch(targets=np.full_like(TOKENS, -100))])
    assert counts.meta["loss"] is None  # nothing was asked, which is no loss of 0


def test_variables_of_another_config_are_refused(variables):
    for config, words in (
        (CONFIG.replace(layout="DD"), "params/segment0/layer1/gain is missing"),
        (CONFIG.replace(layout="D*2"), r"params/segment0/layer0/gain is of shape \(1,\); the config has \(2,\)"),
        (CONFIG.plain, "params/segment0/layer0/halting/embedding is not in the config"),
    ):
        with pytest.raises(Refused, match=words):
            gt_jax.forward(config, variables, TOKENS)
        with pytest.raises(Refused, match=words):
            gt_jax.sample(config, variables, TOKENS, 1)
        with pytest.raises(Refused, match=words):
            gt_jax.save("never", config, variables)
    with pytest.raises(Refused, match=r"variables is .*embedding.*the mapping of params is needed"):
        gt_jax.forward(CONFIG, variables["params"], TOKENS)
    for seed in (-1, 2**32):
        with pytest.raises(Refused, match=re.escape(f"seed is {seed}; it must be a whole number in 0 … 4294967295")):
            gt_jax.initialise(CONFIG, seed)


def test_the_checks_are_no_hindrance_to_traced_calls(variables):
    def loss(variables, tokens):
        return jnp.mean(gt_jax.forward(CONFIG, variables, tokens).logits ** 2)

    value, slope = jax.jit(jax.value_and_grad(loss))(variables, TOKENS)
    rows = jax.jit(jax.vmap(lambda row: loss(variables, row[None])))(TOKENS)
    np.testing.assert_allclose(value, jnp.mean(rows), rtol=1e-5)
    assert jax.tree.structure(slope) == jax.tree.structure(variables)


def test_passes_that_no_layer_runs_are_refused(variables):
    for passes, words in (
        (-1, "passes are -1; whole numbers of 0 or more"), ([1, 2, 3], r"shape \(3,\)"),
        (5, "passes are 5; a layer of this model runs 4 times at most"),
    ):
        with pytest.raises(Refused, match=words):
            gt_jax.forward(CONFIG, variables, TOKENS, control=fixed_passes(passes))
    with pytest.raises(Refused, match=r"memory is given; the model has no memory stream"):
        gt_jax.forward(CONFIG, variables, TOKENS, memory=no_memory(2, CONFIG.width, "float32"))
    leaving = CONFIG.replace(adaptive=None, exit=ExitConfig())
    assert wrong_passes(leaving, free_passes()) == [] and wrong_passes(leaving, fixed_passes(1))[0].startswith(
        "passes are fixed; with config.exit the gates say")  # fmt: skip
    assert wrong_passes(CONFIG, 2) == ["control is a int; `fixed_passes(2)` makes one, or None leaves it to the gates"]
    ahead = small_model("DG", False, mtp=MTPConfig())
    assert abstract(ahead.replace(exit=ExitConfig())), "a layer without a gain beside leaving ones"
    assert wrong_mtp(ahead, None) == [] and "its layer keeps none" in wrong_mtp(ahead, {"position": 0})[0]


def test_a_cache_without_room_is_refused():
    """Keys past the room are not written, so that the tokens after them would be told another past."""
    config = gt_jax.preset("tiny").replace(layout="A", attention=AttentionConfig(heads=2, kv_heads=1, head_width=8),
                                           adaptive=None, width=16, mlp_width=16)  # fmt: skip
    variables, cache = gt_jax.initialise(config, seed=0), empty_cache(config, 2, 20)
    cache = jax.jit(lambda cache: gt_jax.forward(config, variables, TOKENS, cache=cache).cache)(cache)
    with pytest.raises(Refused, match="room for 20 tokens, 16 are in it, and these are 16 more"):
        gt_jax.forward(config, variables, TOKENS, cache=cache)
    for wrong, words in (
        (empty_cache(config, 2, 8), "room for 8 tokens, 0 are in it, and these are 16 more"),
        (empty_cache(config, 1, 20), r"cache: position is of shape \(1,\); the config has \(2,\)"),
        (cache["segment0"], "cache is none"),
    ):
        with pytest.raises(Refused, match=words):
            jax.eval_shape(lambda wrong=wrong: gt_jax.forward(config, variables, TOKENS, cache=wrong).logits)


def test_more_than_a_chunk_and_padding_with_a_cache_are_refused():
    """A row of several chunks, read as one, is another model; padding in a cache is a token of the past."""
    config = gt_jax.preset("tiny").replace(layout="D", width=16, mlp_width=16, adaptive=None,
                                           memory=MemoryConfig(chunk=8, stream=0))  # fmt: skip
    variables, x = gt_jax.initialise(config, seed=0), TOKENS[:1]
    with pytest.raises(Refused, match=r"there are 16 tokens; the model reads chunks of memory.chunk 8"):
        gt_jax.forward(config, variables, x)
    first = gt_jax.forward(config, variables, x[:, :8])
    second = gt_jax.forward(config, variables, x[:, 8:], memory=first.memory)
    whole, _ = forward_rows(LanguageModel(config), variables, jnp.asarray(x), jnp.asarray(ONES[:1]), fixed_passes(1))
    np.testing.assert_allclose(jnp.concatenate([first.logits, second.logits], axis=1), whole, atol=1e-5)
    full = gt_jax.forward(config, variables, x[:, :8], cache=empty_cache(config, 1, 8)).cache
    with pytest.raises(Refused, match="there are 1 tokens behind 8 in the cache"):
        gt_jax.forward(config, variables, x[:, :1], cache=full)
    for memory, words in (
        (first.memory._replace(value=first.memory.value[0]), r"memory.value is of shape \(16,\); \(1, 16\) is needed"),
        (2, "memory is a int; `.memory` of the output"),
    ):
        with pytest.raises(Refused, match=words):
            gt_jax.forward(config, variables, x[:, 8:], memory=memory)
    with pytest.raises(Refused, match=r"memory.segment is of shape \(1,\); \(2,\) is needed"):
        gt_jax.forward(config, variables, TOKENS[:, 8:], memory=first.memory)
    with pytest.raises(Refused, match=r"mtp is asked for; the model has no multi-token prediction"):
        gt_jax.forward(config, variables, x[:, :8], mtp=True)
    with pytest.raises(Refused, match=r"segment_ids have padding \(0\)"):
        gt_jax.forward(config, variables, x[:, :3], np.array([[1, 1, 0]]), cache=empty_cache(config, 1, 8))


def test_counts_of_other_strengths_do_not_grow(variables):
    counts = gt_jax.measure(CONFIG, variables, [TOKENS])
    weaker = CONFIG.replace(adaptive=CONFIG.adaptive.replace(alpha=(1.0, 0.7, 0.5, 0.35)))
    with pytest.raises(Refused, match=r"_meta.alpha is \[1.0, 1.0, 1.0, 1.0\], the source has \[1.0, 0.7, 0.5, 0.35\]"):
        gt_jax.grow(weaker, variables, counts)
    read = repetition.from_json(counts.to_json())
    assert gt_jax.grow(CONFIG, variables, read).plan == gt_jax.grow(CONFIG, variables, counts).plan


def test_what_is_saved_can_be_loaded(variables, tmp_path):
    """Values of fewer bits are stored as the config says, and unchanged; what would lose something is refused."""
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)
    gt_jax.save(tmp_path / "low", CONFIG, low, {"step": 7})
    found = gt_jax.load(tmp_path / "low")
    assert found.metadata["step"] == 7
    jax.tree.map(np.testing.assert_array_equal, found.variables, jax.tree.map(lambda a: a.astype(np.float32), low))
    with pytest.raises(Refused, match="is float32; the config stores bfloat16, which does not hold its values"):
        gt_jax.save(tmp_path / "never", CONFIG.replace(param_dtype="bfloat16"), variables)
    with pytest.raises(Refused, match=r"(?s)kind is 'run'.*step is 'x'.*a is no JSON.*b is no JSON"):
        gt_jax.save(tmp_path / "never", CONFIG, variables,
                    {"kind": "run", "step": "x", "a": float("nan"), "b": np.float32(3)})
    assert not (tmp_path / "never").exists()
