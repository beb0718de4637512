"""The file of pass counts: what reads, what is rebuilt, and what is refused with every problem named."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gt_jax.configs.layout import parse
from gt_jax.errors import Refused
from gt_jax.growth import repetition
from gt_jax.growth.repetition import LayerRepetition, Repetition

MEASURED = {
    "_meta": {"source": "run/100", "lambda_p": 0.0375, "tokens": 65536, "alpha": [1.0, 0.7, 0.5, 0.35]},
    "layer0": {"k_exec": 2, "mean_weight": 1.23, "s_fin": 0.047, "entropy": 0.7092, "p_mu": 0.23, "ponder": 0.078,
               "survival": [1.0, 0.23, 0.05, 0.0], "note": "entropy of the halting distribution"},
    "layer1": {"k_exec": 4, "mean_weight": 2.5, "survival": [1.0, 0.8, 0.5, 0.2]},
}


def counts(*values):
    return {f"layer{index}": {"k_exec": value} for index, value in enumerate(values)}


def write(folder, content, name=repetition.FILE_NAME):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refusal(folder, content):
    path = write(folder, content)
    with pytest.raises(Refused) as caught:
        repetition.read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_measured_file_reads_completely_and_without_warning(tmp_path):
    read = repetition.read(write(tmp_path, MEASURED))
    assert read.k_exec == (2, 4)
    assert read.layers[0] == LayerRepetition(2, (1.0, 0.23, 0.05, 0.0), 1.23, 0.23, 0.047, 0.7092, 0.078,
                                             "entropy of the halting distribution")
    assert read.meta == {"source": "run/100", "lambda_p": 0.0375, "tokens": 65536}
    assert read.warnings == ()
    assert read.to_json() == MEASURED


def test_the_reference_is_the_growth_readme_counts_and_decays_to_the_threshold():
    reference = repetition.reference()
    assert reference.k_exec == (2, 1, 2, 3, 2, 3, 4, 3)
    assert sum(reference.k_exec) == 20
    for layer in reference.layers:
        decay = layer.survival[1] if layer.k_exec > 1 else 0.10
        assert layer.survival[0] == 1.0
        assert layer.survival[layer.k_exec - 1] * decay == pytest.approx(0.10)
        assert all(value == 0 for value in layer.survival[layer.k_exec:])
        assert layer.mean_weight == pytest.approx(sum(layer.survival))


def test_missing_survival_is_rebuilt_from_p_mu_and_else_from_the_threshold_with_a_warning(tmp_path):
    old = {"layer0": {"k_exec": 3, "p_mu": 0.4}, "layer1": {"k_exec": 2}}
    read = repetition.read(write(tmp_path, old, repetition.EARLIER_FILE_NAME))
    assert read.layers[0].survival == pytest.approx((1.0, 0.4, 0.16, 0.0))
    assert read.layers[1].survival == pytest.approx((1.0, math.sqrt(0.1), 0.0, 0.0))
    assert len(read.warnings) == 2
    assert "layer0" in read.warnings[0] and "p_mu" in read.warnings[0]


def test_the_weight_is_read_by_its_earlier_name_and_the_passes_run_from_who_is_alive(tmp_path):
    survival, alive = [1.0, 0.27, 0.02, 0.0], [1.0, 1.0, 0.15, 0.0]
    old = {"layer0": {"k_exec": 3, "expected_k": 1.29, "survival": survival, "alive": alive}}
    (layer,) = repetition.read(write(tmp_path, old)).layers
    assert layer.mean_weight == 1.29 and layer.passes_run == pytest.approx(2.15)
    new = repetition.from_json({"layer0": {**old["layer0"], "mean_weight": 1.29, "passes_run": 2.2}}).layers[0]
    assert new.mean_weight == 1.29 and new.passes_run == 2.2, "what is given is taken, and names that agree may be two"
    bare = repetition.from_json({"layer0": {"k_exec": 3, "survival": survival}}).layers[0]
    assert bare.passes_run is None, "a weight is not a pass: nothing says how many were run"
    assert repetition.from_json({"layer0": bare.to_json()}).layers[0] == bare


def test_more_passes_than_strengths_are_allowed_up_to_64(tmp_path):
    read = repetition.read(write(tmp_path, counts(64, 5.0)))
    assert [len(layer.survival) for layer in read.layers] == [64, 5]
    assert read.k_exec == (64, 5)


def test_float32_means_may_round_above_one_and_other_figures_are_not_read(tmp_path):
    layer = {"k_exec": 2, "survival": [1.0000001, 1.0000002, 0.5, 0], "p_mu": 1.0000001, "delta_ratio": [0.1]}
    read = repetition.read(write(tmp_path, {"layer0": layer}))
    assert read.layers[0].survival == (1.0, 1.0, 0.5, 0.0) and read.layers[0].p_mu == 1.0


def test_strengths_of_the_caller_serve_a_file_without_any(tmp_path):
    assert repetition.read(write(tmp_path, counts(1, 2)), alpha=(1.0, 0.5)).alpha == (1.0, 0.5)
    assert repetition.read(write(tmp_path, MEASURED), alpha=(1.0, 0.5)).alpha == (1.0, 0.7, 0.5, 0.35)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 1)), min_size=1, max_size=9))
def test_json_round_trip(layers):
    made = Repetition(tuple(
        LayerRepetition(k, tuple(p**j for j in range(max(4, k))), 1.0, p_mu=p) for k, p in layers), meta={"a": [1]})
    again = repetition.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made and again.warnings == ()


def test_file_that_is_no_file(tmp_path):
    with pytest.raises(Refused, match=r"nowhere\.json does not exist"):
        repetition.read(tmp_path / "nowhere.json")
    with pytest.raises(Refused, match="is a directory"):
        repetition.read(tmp_path)
    write(tmp_path, counts(1), repetition.EARLIER_FILE_NAME)
    with pytest.raises(Refused, match=r"there is a .*layer_repitation_factor\.json"):
        repetition.read(tmp_path / repetition.FILE_NAME)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="cannot be read"):
        repetition.read(tmp_path / "binary.json")


@pytest.mark.parametrize("text", ["", "k_exec: 2", '{"layer0": ', "[" * 100_000], ids=["empty", "yaml", "cut", "deep"])
def test_not_json(tmp_path, text):
    assert "is not JSON" in refusal(tmp_path, text)


@pytest.mark.parametrize("content", [[1, 2], 3, "two", None], ids=str)
def test_not_an_object(tmp_path, content):
    assert "not an object" in refusal(tmp_path, json.dumps(content))


@pytest.mark.parametrize("value", [0, -1, 1.5, 65, True, "2", None, [2], 10**30, math.inf, math.nan], ids=str)
def test_counts_that_are_no_counts(tmp_path, value):
    message = refusal(tmp_path, counts(1, value))
    assert "layer1.k_exec" in message and "from 1 to 64" in message


@pytest.mark.parametrize(("survival", "what"), [
    ([1.0, 0.5], "list of 4 numbers"), (0.5, "list of 4 numbers"), ([1.0, 1.2, 0, 0], r"survival[1] is 1.2"),
    ([1.0, -0.1, 0, 0], "survival[1] is -0.1"), ([1.0, math.nan, 0, 0], "survival[1] is nan"),
    ([1.0, 0.2, 0.3, 0], "survival cannot rise"), ([1.0, "half", 0, 0], "survival[1]"),
], ids=str)
def test_survival_that_is_none(tmp_path, survival, what):
    assert what in refusal(tmp_path, {"layer0": {"k_exec": 2, "survival": survival}})


@pytest.mark.parametrize(("content", "what"), [
    ({"layer0": {"k_exec": 1}, "layer2": {"k_exec": 1}}, "layer1 missing"),
    ({}, "layer0 missing"), ({"layer1": {"k_exec": 1}}, "layer0 missing"),
    ({"layer0": {"p_mu": 0.5}}, "layer0.k_exec is missing"), ({"layer0": 2}, "layer0 is 2"),
    ({**counts(1), "layerx": {}}, "unknown key 'layerx'"), ({**counts(1), "_meta": []}, "_meta is []"),
    ({**counts(1), "_meta": {"alpha": [1.0, 0]}}, "_meta.alpha"),
    ({**counts(1), "_meta": {"alpha": []}}, "_meta.alpha"),
    ({"layer0": {"k_exec": 1, "p_mu": 1.5}}, "layer0.p_mu"), ({"layer0": {"k_exec": 1, "note": 3}}, "layer0.note"),
    ({"layer0": {"k_exec": 1, "mean_weight": math.inf}}, "layer0.mean_weight"),
    ({"layer0": {"k_exec": 1, "mean_weight": 1.29, "expected_k": 2.15}}, "expected_k 2.15; the second is the earlier"),
    ({"layer0": {"k_exec": 1, "passes_run": "two"}}, "layer0.passes_run"),
    ({"layer0": {"k_exec": 1, "alive": [1.0, 1.5]}}, "layer0.alive"), ({"layer0": {"k_exec": 1, "alive": 2}}, "alive"),
    ({"layer0": {"k_exec": 1, "passes_run": -5}}, "layer0.passes_run is -5.0; a number above 0, at most 64"),
    ({"layer0": {"k_exec": 1, "passes_run": 900}}, "layer0.passes_run"),
    ({"layer0": {"k_exec": 1, "mean_weight": 0}}, "layer0.mean_weight is 0.0"),
    ({"layer0": {"k_exec": 1, "expected_k": -1}}, "layer0.mean_weight is -1.0"),
    ({"layer0": {"k_exec": 1, "alive": [0.1, 0.9]}}, "layer0.alive[1] is 0.9, above the 0.1 before it; alive cannot"),
    ({"layer0": {"k_exec": 1, "alive": [0, 0]}}, "layer0.passes_run, the sum of alive, is 0.0"),
    ({**counts(1), "layer999999999": {"k_exec": 1}}, "layer1"),
], ids=str)
def test_other_mistakes(tmp_path, content, what):
    assert what in refusal(tmp_path, content)


def test_all_problems_come_at_once(tmp_path):
    message = refusal(tmp_path, {"layer0": {"k_exec": 0}, "layer2": {"k_exec": 2.5, "p_mu": 7}, "extra": 1})
    for part in ("layer0.k_exec", "layer1 missing", "layer2.k_exec", "layer2.p_mu", "'extra'"):
        assert part in message


def test_a_key_written_twice(tmp_path):
    assert "'layer0' appears twice" in refusal(tmp_path, '{"layer0": {"k_exec": 1}, "layer0": {"k_exec": 2}}')


def test_the_layout_that_was_measured_is_one_and_that_of_the_source():
    source = parse("D")
    for layout, what in (("G", "of layout G; the source has D"), ("X", "a.json: _meta.layout"), (5, "_meta.layout"),
                         ("D*99999999999999999999", "_meta.layout: .* at most 65536"),
                         ("D*9", "of layout D.9; ")):  # fmt: skip
        with pytest.raises(Refused, match=what):
            repetition.from_json({**counts(1), "_meta": {"layout": layout}}, "a.json").refuse_another_layout(source)
    repetition.from_json({**counts(1), "_meta": {"layout": "D"}}).refuse_another_layout(source)
