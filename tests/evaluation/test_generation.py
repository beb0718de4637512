"""Drawing tokens: what the settings mean at their ends; rows do not know of each other; NaN is no answer."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gt_jax
from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs.presets import preset
from gt_jax.errors import Refused
from gt_jax.evaluation.generation import sample, sample_token
from gt_jax.models.language_model import abstract
from gt_jax.sample import _ended, main
from gt_jax.text.chat_template import chat_template, rendered, stop_tokens
from gt_jax.text.tokenizers import ByteTokenizer

CONFIG = preset("tiny").replace(layout="D", width=16, mlp_width=16, adaptive=None)
LOGITS = jnp.log(jnp.asarray([[0.05, 0.4, 0.05, 0.3, 0.2]]))


def drawn(temperature=1.0, top_k=None, top_p=1.0, logits=LOGITS, count=400):
    """The ids that are drawn at all, each with its share."""
    rows = jnp.broadcast_to(logits, (count, logits.shape[1]))
    found = np.asarray(sample_token(jax.random.key(0), rows, temperature, top_k, top_p))
    return {int(token): float(np.mean(found == token)) for token in np.unique(found)}


@pytest.mark.parametrize(("settings", "ids"), [
    ({"temperature": 0.0}, {1}), ({"temperature": 1e-300}, {1}), ({"temperature": 1e-38}, {1}), ({"top_p": 0.0}, {1}),
    ({"top_p": 1e-45}, {1}), ({"top_k": 1}, {1}), ({"top_k": 1, "temperature": float("inf")}, {1}),
    ({"top_p": 0.39}, {1}), ({"top_p": 0.41}, {1, 3}), ({"top_p": 0.71}, {1, 3, 4}), ({"top_k": 3}, {1, 3, 4}),
    ({"top_k": 3, "temperature": float("inf")}, {1, 3, 4}), ({"top_k": 3, "temperature": 1e300}, {1, 3, 4}),
    # of the three 0.4 / 0.9 is more than 0.44: top_p counts among those that top_k leaves
    ({"top_k": 3, "top_p": 0.44}, {1}), ({"top_k": 99}, set(range(5))), ({"temperature": float("inf")}, set(range(5))),
    ({"logits": jnp.zeros((1, 5)), "top_k": 2}, {0, 1}),  # alike: still no more than two
    ({"logits": jnp.asarray([[3e38, -3e38, 0.0]])}, {0}),  # the difference is beyond float32
])  # fmt: skip
def test_which_tokens_are_left(settings, ids):
    assert set(drawn(**settings)) == ids


def test_the_shares_are_the_probabilities():
    for settings, wanted in (({}, [0.05, 0.4, 0.05, 0.3, 0.2]), ({"temperature": float("inf")}, [0.2] * 5),
                             ({"top_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0])):  # fmt: skip
        found = drawn(**settings, count=4000)
        for token, share in enumerate(wanted):
            assert abs(found.get(token, 0.0) - share) < 5 * (0.25 / 4000) ** 0.5


@pytest.fixture(scope="module")
def weights():
    random = np.random.default_rng(0)
    return {name: (0.3 * random.normal(size=leaf.shape)).astype(leaf.dtype)
            for name, leaf in flatten(abstract(CONFIG)).items()}  # fmt: skip


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "model"
    checkpoint.save(path, nest(weights), {"config": CONFIG.to_json(), "kind": "train", "step": 7})
    return path


def test_settings_that_mean_nothing_are_listed_at_once():
    with pytest.raises(Refused, match=r"(?s)ids in 3 … 999.*length is 0.*temperature is nan.*top_k is 0.*top_p is 1.5"):
        sample(CONFIG, None, np.array([[3, 999]]), 0, temperature=float("nan"), top_k=0, top_p=1.5)
    with pytest.raises(Refused, match=r"seed is 4294967296; .*\n.*seed is -1"):  # 2**32 would draw as 0 does
        sample(CONFIG, None, np.array([[3], [4]]), 1, seed=[2**32, -1])
    with pytest.raises(Refused, match=r"(?s)there are 2 seeds; the prompt has 1 rows.*tokens is 999"):
        sample(CONFIG, None, np.array([[3]]), 1, seed=[1, 2], tokens=999)
    with pytest.raises(Refused, match=r"(?s)seed is \[0.7\]; a whole number"):  # which would draw as 0 does
        sample(CONFIG, None, np.array([[3]]), 1, seed=[0.7])


def test_rows_whose_passes_end_by_the_whole_batch_are_drawn_each_by_itself():
    """Preset tiny_3b ends a pass by the share of all tokens that go on."""
    config = preset("tiny_3b")
    config = config.replace(layout="D", width=16, mlp_width=16, moe=None, hyper=None, memory=None,
                            adaptive=config.adaptive.replace(initial_bias=-2.2))  # fmt: skip
    rows = np.arange(65, 73)[:, None]
    weights = gt_jax.initialise(config, seed=0)
    together = sample(config, weights, rows, 6, temperature=0.0)
    alone = [sample(config, weights, rows[row : row + 1], 6, temperature=0.0) for row in (0, 7)]
    assert config.adaptive.halting == "batch"
    np.testing.assert_array_equal(together[[0, 7]], np.concatenate(alone))


def test_prompts_together_are_continued_as_each_alone(model, capsys):
    """Prompts of two lengths and an empty one, whose text is what follows the end of a document."""
    def said(*words):
        assert main([str(model), "--length", "6", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    together = said("--prompt", "ab", "--prompt", "", "--prompt", "Zo", "--temperature", "inf")
    assert together["step"] == 7 and together["temperature"] == "Infinity"
    assert [one["prompt"] for one in together["samples"]] == ["ab", "", "Zo"]
    alone = [said("--prompt", prompt, "--seed", str(seed), "--temperature", "inf")["samples"][0]
             for seed, prompt in enumerate(("ab", ""))]  # fmt: skip
    assert alone == together["samples"][:2]
    assert together["time_prefill_tokens_per_second"] > 0 and together["time_decode_tokens_per_second"] > 0
    for one in together["samples"]:
        assert bytes(one["tokens"]).decode("utf-8", "replace") == one["text"]
        assert one["ended"] == ("length" if len(one["tokens"]) == 6 else "end of document")


def test_a_stop_ends_the_text_before_it():
    def ended(text, *stops):
        ids = np.array([*text.encode(), 256, 65])
        return tuple(_ended(np.array([1]), ids, ByteTokenizer(), stops).values())

    assert ended("one\n\ntwo") == ("one\n\ntwo", [*b"one\n\ntwo"], "end of document")
    assert ended("one\n\ntwo", "tw", "\n\n") == ("one", [*b"one\n\n"], "stop")
    assert ended("one", "three") == ("one", [*b"one"], "end of document")
    ids = np.array([*b"one", 7, *b"two", 256])
    assert _ended(np.array([1]), ids, ByteTokenizer(), (), (9, 7))["ended"] == "stop token"
    assert _ended(np.array([1]), ids, ByteTokenizer(), (), (9, 7))["text"] == "one"


def test_what_came_along_names_stop_tokens_and_a_template():
    said = {"generation_config.json": '{"eos_token_id": [4, 3, 4]}'}
    assert stop_tokens(said) == (4, 3) and stop_tokens({"generation_config.json": '{"eos_token_id": 5}'}) == (5,)
    assert stop_tokens({}) == () and chat_template(said) is None
    with pytest.raises(Refused, match="has 'end'; ids are whole numbers"):
        stop_tokens({"generation_config.json": '{"eos_token_id": "end"}'})
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    config = {"chat_template": named, "eos_token": {"content": "<end>"}, "pad_token": None}
    beside = {"tokenizer_config.json": json.dumps(config), "special_tokens_map.json": '{"bos_token": "<s>"}'}
    found = chat_template(beside)
    assert found == ("d", {"eos_token": "<end>", "bos_token": "<s>"})
    assert chat_template({"chat_template.jinja": "j", "tokenizer_config.json": json.dumps(config)}).source == "j"


def test_chat_without_a_template_or_without_its_library_is_refused(model, monkeypatch):
    with pytest.raises(Refused, match="no chat template came along with this model"):
        main([str(model), "--chat", "--prompt", "hello"])
    with pytest.raises(Refused, match=r"--chat needs what the user says(.|\n)*--stop-tokens '3,x' is neither"):
        main([str(model), "--chat", "--stop-tokens", "3,x"])
    with pytest.raises(Refused, match=r"--stop-tokens '' is neither none nor ids"):
        main([str(model), "--prompt", "a", "--stop-tokens", ""])
    with pytest.raises(Refused, match=r"--stop-tokens 3,99999:\n.*99999 is no token of the model, whose ids are 0 to"):
        main([str(model), "--prompt", "a", "--stop-tokens", "3,99999"])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(Refused, match=r"pip install 'gt-jax\[chat\]'"):
        rendered(chat_template({"chat_template.jinja": "j"}), [])


def test_logits_that_are_not_finite_are_refused_with_the_checkpoint(weights, tmp_path, capsys):
    broken = {name: np.full_like(value, np.nan) if name.endswith("final_norm/scale") else value
              for name, value in weights.items()}  # fmt: skip
    checkpoint.save(tmp_path / "sick", nest(broken), {"config": CONFIG.to_json(), "kind": "train", "step": 1})
    with pytest.raises(Refused, match=r"sick: logits are not finite \(NaN"):
        main([str(tmp_path / "sick"), "--length", "6", "--prompt", "ab"])
    assert capsys.readouterr().out == ""
