"""The end of a growth: the child on the disk is what its plan says, and predicts what its source predicts."""

import json
import shutil

import jax
import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.configs.data import DataConfig
from gt_jax.configs.layout import parse
from gt_jax.configs.run import RunConfig
from gt_jax.errors import Failed
from gt_jax.evaluation import growth_check
from gt_jax.evaluation.growth_check import check_growth, check_lines
from gt_jax.grow import main as grow
from gt_jax.growth import stream
from gt_jax.growth.plan_entries import Demand, Entry, Plan
from gt_jax.growth.stream import grow_checkpoint
from gt_jax.growth.transform import target_config
from gt_jax.models.language_model import abstract
from tests.support import perturbed, small_model

PLAIN = small_model("D*2", adaptive=False)  # so that every layer once is exact


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source that says what it was trained on, one that does not, and children of both."""
    place = tmp_path_factory.mktemp("check")
    lines = [f"line {n} of a story that is told again and again, {n * n} times\n" for n in range(400)]
    (place / "story.txt").write_text("".join(lines))
    data = DataConfig(text=(str(place / "story.txt"),), sequence_length=24, batch_size=2, held_out=0.3)
    known = {"kind": "train", "run": RunConfig(model=PLAIN, data=data).to_json()}
    once = Plan("map", PLAIN.depth, PLAIN.depth, (Entry(0, 1, 1.0), Entry(1, 1, 1.0)), (Demand(1, 1.0, 1.0),) * 2)
    for name, more in (("source", known), ("stranger", {})):
        checkpoint.save(place / name, perturbed(PLAIN), {"config": PLAIN.to_json(), "step": 3, **more})
        grow_checkpoint(place / name, place / f"{name}-grown", plan=once)
    return place


def test_an_exact_growth_predicts_what_its_source_predicts(folder):
    found = check_growth(folder / "source", folder / "source-grown")
    compared = found["predictions"]
    assert abs(compared["gap"]) < 1e-6 and compared["kl"] < 1e-6 and compared["same_top1"] == 1.0
    assert found["order"] == "kept" and found["files"] > 10
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    lines = check_lines(found)
    assert "as they were written" in lines[0] and "of the source's layers: kept" in lines[0]
    assert f"{compared['tokens']:,} tokens of {compared['units']['count']} " in lines[1]


@pytest.mark.parametrize(("name", "reason"), [("stranger", "nothing says what"), ("source", "GiB are free here")])
def test_what_cannot_be_compared_is_said(folder, monkeypatch, name, reason):
    """No text is known; or the machine does not hold both models. The child is read back all the same."""
    monkeypatch.setattr(growth_check, "_room", lambda: 1000)
    found = check_growth(folder / name, folder / f"{name}-grown")
    assert reason in found["not_compared"] and "predictions" not in found and found["files"] > 10
    assert reason in check_lines(found)[1]


def test_a_child_that_does_not_read_back_fails(folder, tmp_path):
    """One flipped bit names its file; a gain that is not what the plan says names its layer."""
    flipped = tmp_path / "flipped"
    shutil.copytree(folder / "source-grown", flipped)
    chunks = [file for file in flipped.glob("state/params.*/*") if file.is_file()]
    chunk = max(chunks, key=lambda file: file.stat().st_size)
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(bytes(content))
    with pytest.raises(Failed, match=f"does not read back: .*{chunk.name} differs"):
        check_growth(folder / "source", flipped)
    tree = checkpoint.load(folder / "source-grown", perturbed(PLAIN))
    gain = tree["params"]["segment0"]["layer0"]["gain"]
    tree["params"]["segment0"]["layer0"]["gain"] = gain.at[1].add(0.25)
    checkpoint.save(tmp_path / "other", tree, checkpoint.describe(folder / "source-grown")[1])
    with pytest.raises(Failed, match=r"layer 1 is not made of source layer 1 \(params/segment0/layer0/gain, block 1\)"):
        check_growth(folder / "source", tmp_path / "other")


def test_the_order_is_that_of_the_first_passes():
    def of(*sources):
        layout = parse(f"D*{len(sources)}")
        entries = tuple(Entry(source, sources[: at + 1].count(source), 1.0) for at, source in enumerate(sources))
        return growth_check.order_of(Plan("map", parse("D*3"), layout, entries, (Demand(1, 1.0, 1.0),) * 3))

    assert of(0, 1, 0, 2) == "kept"
    assert of(0, 2, 1) == "pass 1 of the source's layers stands as 0, 2, 1"
    assert of(0, 2, 0) == "kept, without layer 1"


@pytest.mark.parametrize("carry", ["weights", "output", "gain"])
def test_every_carry_with_noise_and_another_dtype_passes(folder, tmp_path, carry):
    """What is not copied is made again from the source; only layers of the right source give those bytes."""
    entries = (Entry(0, 1, 1.0), Entry(1, 1, 1.0), Entry(1, 2, 0.7))
    plan = Plan("map", PLAIN.depth, parse("D*3"), entries, (Demand(1, 1.0, 1.0),) * 2)
    grow_checkpoint(folder / "stranger", tmp_path / "child", plan=plan, carry=carry, noise_std=1e-3, dtype="bfloat16")
    assert check_growth(folder / "stranger", tmp_path / "child")["order"] == "kept"
    metadata = checkpoint.describe(tmp_path / "child")[1]
    swapped = [{**entry, "source": 1 - entry["source"]} for entry in metadata["grown_from"]["plan"]["layers"]]
    metadata["grown_from"]["plan"]["layers"] = swapped
    config = target_config(PLAIN, plan, "bfloat16")
    checkpoint.save(tmp_path / "swapped", checkpoint.load(tmp_path / "child", abstract(config)), metadata)
    with pytest.raises(Failed, match="layer 0 is not made of source layer 1"):
        check_growth(folder / "stranger", tmp_path / "swapped")


def test_losses_that_are_no_numbers_are_shown():
    """JSON has them as words."""
    nothing = {name: {"value": "NaN", "low": None, "high": None} for name in ("gap", "kl", "same_top1")}
    said = {"source_loss": "NaN", "target_loss": "Infinity", "tokens": 8, "verdict": "no number", "intervals": nothing,
            "units": {"count": 1, "kind": "document"}}  # fmt: skip
    lines = check_lines({"files": 1, "bytes": 1, "order": "kept", "predictions": said})
    assert "loss nan -> inf, gap +nan %, no number" in lines[1]


def test_the_command_says_what_it_costs_before_it_writes_and_looks_at_the_child_after(folder, tmp_path, capsys):
    arguments = [str(folder / "source"), "--plan", "identity", "--noise-std", "0", "--json"]
    assert grow([*arguments[:1], str(tmp_path / "a"), *arguments[1:]]) == 0
    out, err = capsys.readouterr()
    told = err.splitlines()
    assert told[0].startswith("the source stood at step 3 of 400, in the warm-up")
    assert told[1].startswith("cost: 2 -> 2 layers, none dead; ")
    shown = json.loads(out)
    assert abs(shown["check"]["predictions"]["gap"]) < 1e-6 and shown["cost"]["ratio"] == 1.0
    assert grow([*arguments[:1], str(tmp_path / "b"), *arguments[1:], "--no-check"]) == 0
    assert "check" not in json.loads(capsys.readouterr().out)


def test_a_run_that_saves_another_step_meanwhile_does_not_change_the_source(folder, tmp_path, monkeypatch):
    """The plan, the growth and the look at the child are of the step that was the newest when the command began."""
    known = checkpoint.describe(folder / "source")[1]
    checkpoint.save(tmp_path / "run" / "3", perturbed(PLAIN), known)

    def and_the_run_goes_on(*arguments, **options):
        report = grow_checkpoint(*arguments, **options)
        later = jax.tree.map(lambda leaf: leaf + 1, perturbed(PLAIN))
        checkpoint.save(tmp_path / "run" / "4", later, known | {"step": 4})
        return report

    monkeypatch.setattr(stream, "grow_checkpoint", and_the_run_goes_on)
    assert grow([str(tmp_path / "run"), str(tmp_path / "child"), "--plan", "identity", "--noise-std", "0"]) == 0
    assert checkpoint.describe(tmp_path / "child")[1]["grown_from"]["step"] == 3
