"""Every family against transformers: values by layer, gradients, decoding, there and back, grown and exported."""

import copy
import importlib.util

import pytest

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"the oracle is not installed ({', '.join(MISSING)}); make test-oracle", allow_module_level=True)

import jax
import jax.numpy as jnp
import numpy as np
import torch

from gt_jax import forward, grow_checkpoint, load
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs import layout
from gt_jax.configs.adaptive import AdaptiveConfig
from gt_jax.configs.presets import preset
from gt_jax.devices.sharding import Rules
from gt_jax.evaluation.intermediates import hidden_with_intermediates
from gt_jax.growth.plan_entries import Demand, Entry, Plan
from gt_jax.growth.retrofit import retrofit
from gt_jax.interop.expected_tensors import model_leaves
from gt_jax.interop.families.registry import FAMILIES
from gt_jax.interop.families.rows import PlusOne, units
from gt_jax.interop.from_hf import from_hf
from gt_jax.interop.hf_folder import HFFolder
from gt_jax.interop.to_hf import to_hf
from gt_jax.models.language_model import LanguageModel, apply_network, empty_cache, free_passes
from tests.oracle import models

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]  # warnings of libraries not ours


@pytest.fixture(scope="module", params=models.CASES)
def case(request, tmp_path_factory):
    """(name, their model, its folder, our checkpoint) of a family."""
    folder = tmp_path_factory.mktemp("oracle")
    network = models.made(request.param)
    theirs = models.saved(network, folder / "theirs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        from_hf(theirs, folder / "ours")
    return request.param, network, theirs, folder / "ours"


def same_size(got, wanted, bound):
    """Differences of at most `bound` of the largest value."""
    assert np.max(np.abs(np.asarray(got) - np.asarray(wanted))) <= bound * np.max(np.abs(wanted))


@pytest.mark.parametrize("rows, length", [(2, 13), (1, 1), (1, 67)])  # past the chunks of the delta rule, of 64 tokens
def test_logits_and_states_by_layer(case, rows, length):
    _, network, _, ours = case
    model, tokens = load(ours), models.tokens_of(network, rows, length)
    logits, states = models.outputs(network, tokens)
    same_size(forward(model.config, model.variables, jnp.asarray(tokens)).logits, logits, 1e-4)
    segments = jnp.ones(tokens.shape, jnp.int32)
    seen = hidden_with_intermediates(
        LanguageModel(model.config, Rules()), model.variables, jnp.asarray(tokens), segments, free_passes(), 2)[-1]
    for mine, wanted in zip(seen.states[:, 0], states[:-1], strict=True):
        same_size(mine, wanted, 1e-4)


def test_a_retrofitted_model_computes_the_same_bits(tmp_path):
    """And so what transformers computes; with a cache too, where later passes run and weigh nothing."""
    network = models.made("qwen3_5 1:1")
    from_hf(models.saved(network, tmp_path / "theirs"), tmp_path / "ours")
    model, tokens = load(tmp_path / "ours"), jnp.asarray(models.tokens_of(network))
    same_size(forward(model.config, model.variables, tokens).logits, models.outputs(network, tokens)[0], 1e-4)
    made = retrofit(model.config, model.variables, AdaptiveConfig(alpha=(1.0, 0.7)).seeing_state)
    plain = forward(model.config, model.variables, tokens).logits
    adaptive = forward(made.config, made.variables, tokens)
    np.testing.assert_array_equal(adaptive.logits, plain)
    assert not np.asarray(adaptive.statistics.survival)[:, 1:].any()
    cached = apply_network(LanguageModel(made.config, Rules()), made.variables, tokens,
                           cache=empty_cache(made.config, *tokens.shape)).logits  # fmt: skip
    same_size(cached, plain, 1e-5)


def test_padding_changes_nothing(case):
    """A row that begins later than the batch, and one that ends earlier."""
    _, network, _, ours = case
    model, tokens = load(ours), models.tokens_of(network)
    mask = np.ones(tokens.shape, np.int64)
    mask[1, :5] = mask[0, -3:] = 0
    logits, _ = models.outputs(network, tokens, attention_mask=torch.tensor(mask))
    got = forward(model.config, model.variables, jnp.asarray(tokens), jnp.asarray(mask, jnp.int32)).logits
    same_size(np.asarray(got)[mask > 0], logits[mask > 0], 1e-4)


def test_decoding_with_a_cache_is_the_prefill(case):
    """To 1e-5 in float32, and to 1e-10 in float64: of models whose logits a rounding of the weights moves by less."""
    _, network, _, ours = case
    model, tokens = load(ours), models.tokens_of(network, 2, 9)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        wide = copy.copy(model.config)
        for field in ("param_dtype", "compute_dtype"):
            object.__setattr__(wide, field, "float64")  # a config takes no such name; the layers keep what is wider

        def moved(by):
            return jax.tree.map(
                lambda leaf: jnp.asarray(np.asarray(leaf, np.float64) * (1 + by * rng.uniform(-1, 1, leaf.shape)))
                if leaf.dtype == np.float32 else leaf, model.variables)  # fmt: skip

        assert decoded_beside_prefill(wide, moved(0.0), tokens) <= 1e-10
        exact, *rounded = [forward(wide, moved(by), jnp.asarray(tokens)).logits for by in (0.0, *[2.0**-24] * 4)]
        for logits in rounded:
            same_size(logits, exact, 1e-5)
    assert decoded_beside_prefill(model.config, model.variables, tokens) <= 1e-5


def decoded_beside_prefill(config, variables, tokens):
    """The largest difference of logits, in units of the largest logit."""
    whole = forward(config, variables, jnp.asarray(tokens)).logits
    cache, parts = empty_cache(config, 2, 9), []
    for begin, end in ((0, 6), (6, 7), (7, 9)):
        output = forward(config, variables, jnp.asarray(tokens[:, begin:end]), cache=cache)
        cache = output.cache
        parts.append(output.logits)
    return np.max(np.abs(jnp.concatenate(parts, axis=1) - whole)) / np.max(np.abs(whole))


def test_gradients(case):
    """Of every tensor, each to 1e-3 of its own size."""
    _, network, _, ours = case
    model, tokens = load(ours), models.tokens_of(network)

    def loss(params):
        logits = forward(model.config, {**model.variables, "params": params}, jnp.asarray(tokens)).logits[:, :-1]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[:, 1:, None], -1))

    found = flatten({"params": jax.grad(loss)(model.variables["params"])})
    network.zero_grad()
    theirs = network(torch.tensor(tokens), use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(theirs.reshape(-1, theirs.shape[-1]), torch.tensor(tokens)[:, 1:].reshape(-1)
                                      ).backward()
    wanted = {key: value.grad.numpy() for key, value in network.named_parameters() if value.grad is not None}
    largest = max(np.max(np.abs(value)) for value in wanted.values())
    family = FAMILIES[model.metadata["converted_from"]["family"]]
    table = family.table(model.config, family.variants({key: value.shape for key, value in wanted.items()}))
    compared = set()
    for unit in units(model.config, table):
        held = [np.asarray(found[part.path], np.float64)[part.place] for part in unit.parts]
        plus = isinstance(unit.parts[0].transform, PlusOne)  # of 1 + w the gradient is that of w
        mine = unit.to_theirs([one + plus for one in held])
        theirs = wanted[unit.name] if unit.expert is None else wanted[unit.name][unit.expert]
        bound = 1e-3 * max(np.max(np.abs(theirs)), 1e-4 * largest)  # some are 0 but for rounding: of keys' biases
        assert np.max(np.abs(mine.reshape(theirs.shape) - theirs)) <= bound, unit.name
        compared.add(unit.name)
    assert compared == set(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_is_bit_identical(case, dtype, tmp_path):
    name = case[0]
    theirs = models.saved(models.made(name, dtype), tmp_path / "theirs", max_shard_size="20KB")
    from_hf(theirs, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back", shard_bytes=30_000)
    before, after = HFFolder(theirs), HFFolder(tmp_path / "back")
    assert before.tensors == after.tensors
    for tensor in before.tensors:
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor
    assert len(after.files) > 1
    network = models.opened(tmp_path / "back")
    wanted = models.made(name, dtype).state_dict()
    for tensor, value in network.state_dict().items():
        assert torch.equal(value, wanted[tensor]), tensor


def test_grown_by_identities_it_computes_the_same_in_transformers(case, tmp_path):
    _, network, _, ours = case
    config = load(ours).config
    types = config.depth.types
    entries, grown = [], ""
    for layer in range(len(types)):  # every layer, and after it the same once more at strength 0
        entries += [Entry(layer, 1, 1.0), Entry(layer, 0, 0.0)]
        grown += types[layer] * 2
    demands = (Demand(1, 1.0, 1.0),) * len(types)
    plan = Plan("map", config.depth, layout.from_types(grown), tuple(entries), demands)
    grow_checkpoint(ours, tmp_path / "grown", plan=plan)
    report = to_hf(tmp_path / "grown", tmp_path / "deep")
    assert report["zeroed"] == list(range(1, 2 * len(types), 2))
    deep = models.opened(tmp_path / "deep")
    assert deep.config.num_hidden_layers == 2 * len(types)
    tokens = models.tokens_of(network)
    wanted, _ = models.outputs(network, tokens)
    same_size(models.outputs(deep, tokens)[0], wanted, 1e-6)
    grown_model = load(tmp_path / "grown")
    mine = forward(grown_model.config, grown_model.variables, jnp.asarray(tokens)).logits
    shallow = load(ours)
    same_size(mine, forward(shallow.config, shallow.variables, jnp.asarray(tokens)).logits, 1e-6)


PRESETS = {"qwen3_5_9b": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
           "qwen3_5_35b_a3b": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
           "qwen3_next_80b_a3b": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
           "olmo_hybrid_7b": ("OlmoHybridConfig", "OlmoHybridForCausalLM")}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    import transformers

    config, model = PRESETS[name]
    with torch.device("meta"):
        network = getattr(transformers, model)(getattr(transformers, config)())
    ours = {path: leaf for path, leaf in model_leaves(preset(name)).items() if not path.endswith("/gain")}
    assert sum(leaf.size for leaf in ours.values()) == sum(value.numel() for value in network.parameters())
