"""`python -m gt_jax.grow`: the dry run's contract, and exit code 2 with a clear message for everything impossible."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.opened import open_checkpoint
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs import presets
from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import HyperConfig
from gt_jax.configs.run import TrainConfig
from gt_jax.configs.standing import stood
from gt_jax.errors import Failed, Refused
from gt_jax.grow import main
from gt_jax.growth.memory_size import memory_size
from gt_jax.growth.plan_entries import Plan
from gt_jax.growth.plan_file import read_plan_file
from gt_jax.models import language_model

REFERENCE = [2, 1, 2, 3, 2, 3, 4, 3]


def run(*arguments):
    command = [sys.executable, "-m", "gt_jax.grow", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def counts(folder, values, name="counts.json"):
    path = folder / name
    path.write_text(json.dumps({f"layer{index}": {"k_exec": value} for index, value in enumerate(values)}))
    return path


def refusal(*arguments):
    with pytest.raises(Refused) as caught:
        main([str(argument) for argument in arguments])
    return str(caught.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of the tiny model, narrowed; zeros but for the gains, because a dry run reads no other value."""
    small = presets.tiny().replace(width=16, mlp_width=16)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), language_model.abstract(small))
    tree = nest({name: leaf + name.endswith("/gain") for name, leaf in flatten(zeros).items()})
    path = tmp_path_factory.mktemp("grow") / "source"
    checkpoint.save(path, tree, {"config": small.to_json(), "step": 3, "kind": "train"})
    return path


def test_dry_run_without_files_prints_one_json_object():
    done = run("--dry-run", "--json", "--recipe", "readme")
    assert (done.returncode, done.stderr) == (0, (
        "warning: passes that nobody asked for run in target layers 5 (pass 2 of layer 1, at 0.70), "
        "16 (pass 3 of layer 4, at 0.50)\n")), "the recipe repeats whole blocks"
    found = json.loads(done.stdout)
    assert found["layout"] == "DDDG*5"
    assert found["requested"] == REFERENCE and found["granted"] == [2, 2, 2, 2, 3, 3, 3, 3]
    order = [(block, copy) for block, copies in ((0, 2), (1, 3)) for copy in range(1, copies + 1)]
    assert found["layers"] == [
        {"target": 4 * index + slot, "type": "DDDG"[slot], "source": 4 * block + slot, "copy": copy,
         "coefficient": [1.0, 0.7, 0.5][copy - 1]}
        for index, (block, copy) in enumerate(order) for slot in range(4)]
    assert str(Plan.from_json(found).target_layout) == "DDDG*5"


def test_dry_run_loads_no_array_library():
    code = "import sys; from gt_jax.grow import main; main(['--dry-run']); print(sorted({'jax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("[]\n")


def test_default_coefficients_are_alpha_times_survival(capsys):
    assert main(["--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["carry"] == "gain" and found["options"]["coefficient"] == "expected"
    first, again = found["layers"][:2]  # layer 0 runs twice, p_mu 0.1 ** (1 / 2)
    assert (first["source"], first["copy"], first["coefficient"]) == (0, 1, 1.0)
    assert (again["source"], again["copy"], again["coefficient"]) == (0, 2, pytest.approx(0.7 * 0.1**0.5))
    assert found["kind"] == "dealt" and found["granted"] == [2, 1, 2, 2, 2, 3, 4, 3] and found["dead"] == [4]


def test_dead_layers_are_named_and_not_counted(tmp_path, capsys):
    lopsided = str(counts(tmp_path, [1, 1, 1, 4]))
    main(["--dry-run", "--repetition", lopsided])
    out, err = capsys.readouterr()
    assert "got 4 layers that run; coefficient mass kept in all: 87%" in out and "dead" not in out + err
    main(["--dry-run", "--repetition", lopsided, "--target-layers", "8"])
    out, err = capsys.readouterr()
    assert "got 5 layers that run and 3 dead layers; coefficient mass kept in all: 95%" in out
    assert "warning: dead layers: the coefficient is below 0.02 in 3 of 8 target layers: 1 (pass 2 of layer 0), " in err


def test_dry_run_for_a_reader_names_what_each_layer_asked_for_and_got(capsys):
    main(["--dry-run", "--recipe", "readme"])
    out = capsys.readouterr().out
    assert "DDDG*2 (8 layers) -> DDDG*5 (20 layers)" in out
    row = next(line for line in out.splitlines() if line.split()[:4] == ["6", "D", "4", "3"])
    assert "86%" in row and "1 short" in row


def test_counts_from_a_file_with_the_earlier_name_and_its_warning(tmp_path, capsys):
    path = counts(tmp_path, [2, 1, 2, 4] * 2, "layer_repitation_factor.json")
    assert main(["--dry-run", "--json", "--repetition", str(path), "--round", "down"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["layout"] == "DDDG*4" and found["requested"] == [2, 1, 2, 4] * 2
    assert "warning: layer0 has neither survival nor p_mu" in err and len(found["warnings"]) == 9


def test_every_flag_of_the_plan_takes_effect(tmp_path, capsys):
    path = counts(tmp_path, [2, 1, 2, 4] * 2)
    main(["--dry-run", "--json", "--repetition", str(path), "--round", "balance", "--target-layers", "28",
               "--coefficient", "schedule", "--correct", "ratio", "--carry", "output", "--noise-std", "0",
               "--seed", "5", "--dtype", "bfloat16"])
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "DDDG*7"
    assert found["layers"][0]["coefficient"] == pytest.approx(2 / 2.25)
    assert [found[name] for name in ("carry", "noise_std", "seed", "dtype")] == ["output", 0.0, 5, "bfloat16"]
    main(["--dry-run", "--json", "--plan", "identity"])
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "DDDG*2" and {row["coefficient"] for row in found["layers"]} == {1.0}


def test_dry_run_with_a_source_adds_every_tensor(source, capsys):
    assert main([str(source), "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "reference counts" in err
    rows = {row["path"]: row for row in found["tensors"]}
    small = presets.tiny().replace(width=16, mlp_width=16, layout="DDDG*5", adaptive=None)
    assert {path: list(leaf.shape) for path, leaf in flatten(language_model.abstract(small)).items()} == {
        path: row["shape"] for path, row in rows.items()}
    assert rows["params/segment0/layer0/mlp/up/w"] == {
        "path": "params/segment0/layer0/mlp/up/w", "old_shape": [2, 16, 16], "shape": [5, 16, 16],
        "dtype": "float32", "rule": "scaled", "bytes": 5 * 16 * 16 * 4}
    assert len(found["dropped"]) == 20 and all("/halting/" in path for path in found["dropped"])
    assert found["bytes"] == sum(row["bytes"] for row in rows.values()) and found["moments"] == 0
    assert main([str(source), "--dry-run"]) == 0
    assert "params/segment0/layer0/mlp/up/w" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "what"), [
    ((), "SRC and DST are needed"), (("--dry-run", "--repetition", "nowhere.json"), "nowhere.json does not exist"),
    (("--dry-run", "--target-layers", "21"), "cannot be reached"), (("--dry-run", "--round", "sideways"), "sideways"),
    (("nowhere", "new", "--noise-std", "nan"), "--noise-std nan"), (("nowhere", "new"), "nowhere does not exist"),
    (("--dry-run", "--map", "1-3,5-8"), "the map mixes types"),
    (("--dry-run", "--plan-file", "nowhere.json"), "nowhere.json does not exist"),
    (("--dry-run", "--plan", "layer", "--target-layout", "DDDG*5"), "does not fit --target-layout DDDG*5"),
], ids=str)
def test_exit_code_two_nothing_on_stdout_one_message_on_stderr(arguments, what):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert what in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("values", "what"), [
    ([1] * 6, "6 layers are not a multiple of the pattern DDDG"), ([0] + [1] * 7, "layer0.k_exec is 0"),
    ([-1] + [1] * 7, "layer0.k_exec is -1"), ([1.5] + [1] * 7, "layer0.k_exec is 1.5"),
    ([65] + [1] * 7, "layer0.k_exec is 65"),
], ids=str)
def test_bad_counts(tmp_path, values, what):
    path = counts(tmp_path, values)
    message = refusal("--dry-run", "--repetition", path)
    assert what in message and str(path) in message


def test_a_sum_that_does_not_divide_and_a_depth_that_cannot_be_reached(tmp_path):
    message = refusal("--dry-run", "--repetition", counts(tmp_path, [2, 1, 2, 4, 2, 3, 4, 3]), "--target-layers", "22")
    assert "up gives 24" in message and "any multiple of 4 from 8" in message


@pytest.mark.parametrize(("arguments", "what"), [
    (("--dry-run", "--recipe", "readme", "--carry", "gain"), "--carry gain contradicts it"),
    (("--dry-run", "--resume"), "--resume has no meaning"), (("--dry-run", "--seed", "-1"), "--seed -1"),
    (("--dry-run", "--verify-text", "x"), "--verify-text has no meaning"),
    (("--dry-run", "--memory", "much"), "--memory 'much'"), (("--dry-run", "--memory", "0GiB"), "--memory"),
    (("--dry-run", "--target-layers", "0"), "--target-layers 0"), (("only",), "SRC and DST are needed"),
    (("--dry-run", "--plan", "identity", "--round", "up"), "--round has no meaning"),
    (("same", "same"), "is the source itself"),
    (("a", "b", "--verify-text", "nowhere.txt"), "nowhere.txt is not a file"),
    (("a", "b", "--tokenizer", "bytes"), "--tokenizer reads --verify-text; there is none"),
    (("--dry-run", "--plan", "sideways"), "sideways is none of block, dealt, layer, split, map, stack, identity"),
    (("--dry-run", "--plan", "map"), "needs its list: --map 1-8,1-4,1-8"),
    (("--dry-run", "--plan", "layer", "--map", "1-8"), "--map has no meaning for --plan layer"),
    (("--dry-run", "--map", "1-8", "--round", "up"), "--round has no meaning for --plan map"),
    (("--dry-run", "--plan", "x.json"), "identity; a plan file is named by --plan-file x.json"),
    (("--dry-run", "--plan", "."), "a plan file is named by --plan-file ."),
    (("--dry-run", "--plan-file", "x.json", "--plan", "block"), "--plan has no meaning for --plan-file x.json"),
    (("--dry-run", "--plan-file", "x.json", "--from", "k_exec"), "--from has no meaning for --plan-file x.json"),
    (("--dry-run", "--plan-file", "x.json", "--recipe", "readme"), "--recipe has no meaning"),
    (("--dry-run", "--map", "1-9"), "a layer from 1 to 8"), (("--dry-run", "--map", "nowhere.csv"), "does not exist"),
    (("--dry-run", "--plan", "split", "--round", "balance"), "does not go with the split plan"),
    (("--dry-run", "--plan", "stack", "--target-layers", "20"), "any multiple of 8 from 8"),
    (("--dry-run", "--target-layout", "DDXG"), "--target-layout: layout pattern 'DDXG'"),
    (("--dry-run", "--target-layout", "DDDG*6"), "--target-layout DDDG*5 is what this plan gives"),
    (("--dry-run", "--plan", "identity", "--target-layout", "D*8"), "does not fit"),
    (("--dry-run", "--plan-out", "."), ". exists; name a new file"),
    (("--dry-run", "--plan-out", "nowhere/plan.json"), "nowhere is not a folder"),
    (("--dry-run", "--picture", "plan.svg"), "name it plan.png"),
    (("--dry-run", "--plan-out", "a.png", "--picture", "a.png"), "also the name of another output"),
    (("a", "b", "--plan-out", "b"), "also the name of another output"),
    (("--dry-run", "--repetition", "."), "is a directory"),
], ids=str)
def test_arguments_that_do_not_go_together(arguments, what):
    assert what in refusal(*arguments)


@pytest.mark.parametrize(("arguments", "notation", "granted"), [
    (("--plan", "layer"), "D*5,G*3,D*9,G*3", REFERENCE), (("--plan", "split"), "DDDG*6", REFERENCE),
    (("--plan", "stack", "--round", "down"), "DDDG*4", [2, 1, *[2] * 6]),
    (("--map", "1-8,1-4,1-8"), "DDDG*5", [2, 1, 2, 3, *[2] * 4]),
    (("--from", "mean_weight"), "DDDG*4", [2, 1, *[2] * 6]),
    (("--plan", "layer", "--from", "mean_weight", "--round", "down"), "D*3,G,D*4,G", [1] * 6 + [2, 1]),
    (("--map", "1-3", "--target-layout", "D,D*2"), "D,D*2", [1] * 3 + [0] * 5),
], ids=str)
def test_every_plan_goes_out_as_json_and_picture_and_comes_in_again(tmp_path, capsys, arguments, notation, granted):
    file, picture = tmp_path / "plan.json", tmp_path / "plan.PNG"
    assert main(["--dry-run", "--json", *arguments, "--plan-out", str(file), "--picture", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == notation and found["granted"] == granted and found["requested"] == REFERENCE
    assert all(mass == pytest.approx(kept * asked) for mass, kept, asked in zip(
        found["mass"]["granted"], found["mass"]["kept"], found["mass"]["requested"], strict=True))
    written = json.loads(file.read_text())
    assert written == {key: found[key] for key in written}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.PNG", "plan.json"]
    main(["--dry-run", "--json", "--plan-file", str(file), "--target-layout", notation, "--carry", "output"])
    again = json.loads(capsys.readouterr().out)
    assert again | {"carry": "gain", "warnings": []} == found | {"warnings": []}
    dry = tmp_path / "dry.json"  # the whole object of a dry run is a plan file too
    dry.write_text(json.dumps(found))
    assert Plan.from_json(found) == read_plan_file(dry)[0]
    main(["--dry-run", "--json", "--plan-file", str(dry), "--seed", "5"])  # said: it is not read
    assert any("says seed 0; the command line" in one for one in json.loads(capsys.readouterr().out)["warnings"])
    reading, writing = os.pipe()  # which can be read once
    os.write(writing, dry.read_bytes())
    os.close(writing)
    main(["--dry-run", "--json", "--plan-file", f"/dev/fd/{reading}"])
    os.close(reading)
    assert json.loads(capsys.readouterr().out)["layout"] == notation


def test_a_plan_file_that_lost_the_order_is_refused_unless_it_is_a_map(tmp_path, capsys):
    """Plans of earlier versions stand in the wrong order where a type comes again; so may those edited by hand."""
    file = tmp_path / "plan.json"
    main(["--dry-run", "--plan-out", str(file)])
    data = json.loads(file.read_text())
    data["layers"][0], data["layers"][2] = ({**data["layers"][at], "target": to} for at, to in ((2, 0), (0, 2)))
    file.write_text(json.dumps(data))
    message = refusal("--dry-run", "--plan-file", file)
    assert f"plan file {file}: its dealt plan loses the source's order" in message and '"kind": "map"' in message
    assert "target layer 2 is pass 1 of source layer 0, target layer 0 before it that of source layer 1" in message
    file.write_text(json.dumps(data | {"kind": "map"}))
    for meant in (["--plan-file", str(file)], ["--map", "2,1,3,4,5-8"]):
        capsys.readouterr()
        main(["--dry-run", *meant])
        assert "warning: the list loses the source's order: target layer " in capsys.readouterr().err


def test_a_plan_from_the_passes_run_is_made_of_counts_that_have_them(tmp_path, capsys):
    """`alive` is what `measure` wrote before it wrote the sum; the reference counts have neither."""
    assert "take --from k_exec or --from mean_weight" in refusal("--dry-run", "--from", "passes_run")
    layer = {"k_exec": 3, "expected_k": 1.29, "survival": [1.0, 0.27, 0.02, 0.0], "alive": [1.0, 0.9, 0.1, 0.0]}
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({f"layer{n}": layer for n in range(4)}))
    assert main(["--dry-run", "--json", "--plan", "layer", "--from", "passes_run", "--round", "nearest",
                 "--repetition", str(file)]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["granted"] == [2] * 4 and found["asked"] == pytest.approx([2.0] * 4)


def test_the_tables_name_identities_and_means(capsys):
    main(["--dry-run", "--plan", "split", "--from", "mean_weight", "--round", "nearest"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "split plan: DDDG*2 (8 layers) -> DDDG*4 (16 layers)"
    assert ["0", "D", "1.32", "1"] in [line.split()[:4] for line in lines]
    assert any("got 12 layers that run and 4 dead layers" in line for line in lines)
    assert [line.split()[-1] for line in lines if line.split()[3:4] == ["-"]] == ["dead"] * 4


def test_a_plain_model_is_stacked_whole_without_counts(tmp_path, capsys):
    """It has no passes that could be measured: every copy has full strength, reference counts are not spoken of."""
    config = presets.tiny().plain.replace(width=16, mlp_width=16, layout="DG")
    leaves = sorted(flatten(language_model.abstract(config)).items())
    values = {name: np.full(leaf.shape, index + 1, leaf.dtype) for index, (name, leaf) in enumerate(leaves)}
    checkpoint.save(tmp_path / "plain", nest(values), {"config": config.to_json(), "step": 3, "kind": "train"})
    words = [str(tmp_path / "plain"), str(tmp_path / "deep"), "--plan", "stack", "--noise-std", "0", "--no-check"]
    assert main([*words, "--target-layers", "6"]) == 0
    told = capsys.readouterr()
    assert "reference counts" not in told.err and "2 -> 6 layers, none dead" in told.err
    deep = open_checkpoint(tmp_path / "deep")
    assert deep.config.layout == "DG*3" and deep.config.adaptive is None
    for name, value in flatten(checkpoint.load(tmp_path / "deep", language_model.abstract(deep.config))).items():
        first = values[name].ravel()[0]  # gains too: as strong as in the source
        assert (np.asarray(value) == first).all(), name
    said = refusal(words[0], tmp_path / "no", "--plan", "stack", "--target-layers", "5")
    assert "--target-layers 5 is not what" in said and "any multiple of 2 from 2 (every layer once)" in said
    assert main([words[0], "--plan", "stack", "--dry-run", "--plan-out", str(tmp_path / "p.json")]) == 0
    assert main([words[0], "--plan-file", str(tmp_path / "p.json"), "--dry-run"]) == 0
    assert "does not say which checkpoint" not in capsys.readouterr().err
    for kind in ([], ["--plan", "layer"], ["--map", "1-2,1-2"], ["--keep-gates"]):
        said = refusal(words[0], "--dry-run", *kind)
        assert "is a plain model, which has no pass counts: --plan stack repeats" in said
        assert all(way in said for way in ("--plan identity", "--repetition", "--plan-file", "gt_jax retrofit"))
    asked = ["--plan", "layer", "--repetition", str(counts(tmp_path, [1, 2]))]
    assert main([words[0], "--dry-run", *asked]) == main([words[0], "--dry-run", "--plan", "identity"]) == 0
    capsys.readouterr()
    plan = ["--plan", "stack", "--dry-run", "--json"]
    assert main([words[0], *plan]) == 0 and json.loads(capsys.readouterr().out)["layout"] == "DG*2"
    assert main([words[0], *plan, "--target-layout", "DG*4"]) == 0


def test_a_layer_that_is_dead_in_the_source_is_dead_in_the_child(source, tmp_path, capsys):
    """As the identities of a first growth are for the second: the plan's coefficient alone calls them alive."""
    leaves, metadata = checkpoint.describe(source)
    tree = checkpoint.load_paths(source, leaves)
    tree["params/segment0/layer1/gain"] = np.asarray([1.0, 0.003], np.float32)  # layer 5
    checkpoint.save(tmp_path / "again", nest(tree), metadata)
    for arguments, dead in ((["--plan", "identity"], [5]), (["--plan", "stack", "--target-layers", "16", "--round",
                                                             "balance", "--coefficient", "schedule"], [5, 13])):
        main([str(tmp_path / "again"), "--dry-run", "--json", *arguments])
        out, err = capsys.readouterr()
        found = json.loads(out)
        assert found["cost"]["dead"] == dead and f"{len(dead)} of them dead" in err
        line = next(line for line in found["warnings"] if line.startswith("layers dead in the source stay so"))
        assert "in target layers 5 (pass 1 of layer 5, of gain 0.003)" in line
    main([str(source), "--dry-run", "--json", "--plan", "identity"])
    out, err = capsys.readouterr()
    assert json.loads(out)["cost"]["dead"] == json.loads(out)["warnings"] == [] and "none dead" in err


def test_a_plan_file_for_another_source_is_refused(source, tmp_path, capsys):
    file = tmp_path / "plan.json"
    main(["--dry-run", "--repetition", str(counts(tmp_path, [1] * 12)), "--plan-out", str(file)])
    message = refusal(source, "--dry-run", "--plan-file", file)
    assert f"plan file {file} is for a source of layout DDDG*3 (12 layers); this source is DDDG*2 (8 layers)" in message
    assert message == refusal(source, tmp_path / "new", "--plan-file", file)
    capsys.readouterr()
    fits = tmp_path / "fits.json"
    main([str(source), "--dry-run", "--plan", "split", "--plan-out", str(fits)])
    main([str(source), "--dry-run", "--json", "--plan-file", str(fits)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["path"]: row["shape"] for row in found["tensors"]}
    assert rows["params/segment0/layer0/gain"] == [6]
    assert [line.split(":")[0] for line in found["warnings"]] == ["dead layers"]
    assert not (tmp_path / "new").exists()


def test_recipe_and_the_same_flag_agree(capsys):
    assert main(["--dry-run", "--recipe", "readme", "--carry", "weights"]) == 0
    assert "recipe readme" in capsys.readouterr().out


@pytest.mark.parametrize(("step", "says"), [(320, None), (400, "stood in the decay"), (3, None)])
def test_where_the_source_stood_is_said(source, tmp_path, step, says, capsys):
    run = {"train": TrainConfig(steps=400).to_json(), "data": DataConfig().to_json()}
    stored = checkpoint.load(source)
    place = tmp_path / "run" / str(step)
    checkpoint.save(place, stored, {**checkpoint.describe(source)[1], "step": step, "run": run})
    assert main([str(place), "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["stood"] == stood(TrainConfig(steps=400), step).to_json()
    assert f"the source stood at step {step} of 400" in err
    assert [says is not None and says in line for line in found["warnings"]].count(True) == (says is not None)


def test_sizes():
    assert [memory_size(text) for text in ("2GiB", "512 MiB", "1.5GB", "100", "1KiB")] == [
        2**31, 2**29, 1_500_000_000, 100, 1024]


def test_bad_sources_and_targets(source, tmp_path):
    (tmp_path / "there").mkdir()
    assert "there exists; name a new folder" in refusal(source, tmp_path / "there", "--resume")
    shutil.copytree(source, tmp_path / "whole")
    assert "exists; it is whole, nothing is left to finish" in refusal(source, tmp_path / "whole", "--resume")
    assert "is the source itself" in refusal(source, source.parent / "." / source.name)
    (tmp_path / "file").write_text("no checkpoint")
    assert "is a file" in refusal(tmp_path / "file", "--dry-run")
    (tmp_path / "folder").mkdir()
    assert "empty folder" in refusal(tmp_path / "folder", "--dry-run")
    assert "counts 4 layers, the source layout DDDG*2 has 8" in refusal(
        source, "--dry-run", "--repetition", counts(tmp_path, [1] * 4))
    other = tmp_path / "alpha.json"
    other.write_text(json.dumps({"_meta": {"alpha": [1.0, 0.5]}} | {f"layer{i}": {"k_exec": 1} for i in range(8)}))
    assert "_meta.alpha is [1.0, 0.5]" in refusal(source, "--dry-run", "--repetition", other)


def test_growing_passes_everything_on_and_reports(source, tmp_path, monkeypatch, capsys):
    given, failing = {}, []

    def grow_checkpoint(source, target, **options):
        given.update(options, source=source, target=target)
        options["progress"]("half way")
        return {"tensors": 3, "bytes": 2048, "moments": 1024, "seconds": 0.5, "dropped": ["a"]}

    def verify_growth(source, target, files, tokenizer):
        if failing:
            return None, [], failing[0]
        found = {"text": list(map(str, files)), "tokenizer": tokenizer}
        return found, [f"verified {found}"], None

    def check_growth(source, target, say, *, alone):
        return {"looked at": str(target), "alone": alone}

    for name, members in (("gt_jax.growth.stream", {"grow_checkpoint": grow_checkpoint}),
                          ("gt_jax.evaluation.growth_check",
                           {"check_growth": check_growth, "check_lines": lambda found: [f"checked {found}"],
                            "verify_growth": verify_growth})):
        module = types.SimpleNamespace(**members)
        monkeypatch.setitem(sys.modules, name, module)
        package, _, leaf = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(package), leaf, module, raising=False)
    text = tmp_path / "held_out.txt"
    text.write_text("held out " * 200)
    files = ["--plan-out", str(tmp_path / "plan.json"), "--picture", str(tmp_path / "plan.png")]
    arguments = [str(source), str(tmp_path / "new"), "--repetition", str(counts(tmp_path, REFERENCE)), "--recipe",
                 "readme", "--seed", "4", "--memory", "1MiB", "--resume", "--verify-text", str(text),
                 "--tokenizer", "bytes"]
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["check"] == {"looked at": str(tmp_path / "new"), "alone": True}
    assert found["report"]["tensors"] == 3 and found["verify"] == {"text": [str(text)], "tokenizer": "bytes"}
    assert "half way" in err
    assert given.pop("progress") and str(given.pop("plan").target_layout) == "DDDG*5"
    assert given.pop("counts").k_exec == tuple(REFERENCE)
    assert given == {"source": source, "target": tmp_path / "new", "carry": "weights", "noise_std": 1e-4, "seed": 4,
                     "dtype": None, "memory": 2**20, "resume": True, "moments": True}
    assert main([*arguments, *files, "--no-moments"]) == 0 and given["moments"] is False
    out = capsys.readouterr().out
    assert "3 tensors, 2.0 KiB (1.0 KiB of it second moments)" in out
    assert "verified" in out and "coefficient mass kept in all" in out
    assert read_plan_file(tmp_path / "plan.json")[0].to_json() == found["plan"]
    assert (tmp_path / "plan.png").stat().st_size > 1000
    failing.append(MemoryError("both models"))  # what was grown is said, and written beside, all the same
    with pytest.raises(Failed, match=r"new is whole, and was not verified \(MemoryError: both models\)"):
        main([*arguments, "--plan-out", str(tmp_path / "again.json")])
    assert "3 tensors" in capsys.readouterr().out and (tmp_path / "again.json").exists()


def test_a_growth_that_is_refused_writes_no_plan(source, tmp_path):
    refusal(source, tmp_path / "new", "--memory", "1", "--plan-out", tmp_path / "plan.json", "--picture",
            tmp_path / "plan.png")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("plan")]


def test_strength_zero_on_hyper_connections_is_pointed_out(tmp_path, capsys):
    config = presets.tiny().replace(layout="DG", width=16, mlp_width=16, hyper=HyperConfig(streams=2))
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), language_model.abstract(config))
    checkpoint.save(tmp_path / "hyper", tree, {"config": config.to_json(), "step": 0, "kind": "train"})
    for carry, told in (("output", True), ("gain", False)):
        main([str(tmp_path / "hyper"), "--dry-run", "--plan", "split", "--carry", carry,
                   "--repetition", str(counts(tmp_path, [1, 2]))])
        assert ("still mix the streams of the hyper-connections" in capsys.readouterr().err) == told


def test_half_a_checkpoint_names_every_missing_tensor(source, tmp_path):
    flat = dict(flatten(checkpoint.load(source)))
    missing = ["params/segment0/layer1/mlp/up/w", "params/segment0/layer3/mixer/output/w"]
    for path in missing:
        del flat[path]
    _, metadata = checkpoint.describe(source)
    checkpoint.save(tmp_path / "half", nest(flat), {"config": metadata["config"], "step": 0, "kind": "train"})
    message = refusal(tmp_path / "half", "--dry-run")
    assert all(path in message for path in missing)


def test_all_zero_layers_under_weights_are_pointed_out(capsys):
    main(["--dry-run", "--carry", "weights", "--plan", "block"])
    assert "target layers 5, 16 0" in capsys.readouterr().err
