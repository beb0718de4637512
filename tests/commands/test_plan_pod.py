"""plan_pod: what it reads from a program, which meshes it tries, what it refuses; a real topology where libtpu is."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gt_jax.configs.presets import preset
from gt_jax.configs.resolvent import ResolventConfig
from gt_jax.devices.pods import hlo, topologies
from gt_jax.devices.sharding import Rules, make_mesh
from gt_jax.errors import Failed, Refused
from gt_jax.models.flops import model_flops
from gt_jax.plan_pod import advice, chosen, least_seconds, main, mesh_sizes, parser, report_lines
from gt_jax.training import mesh_search
from gt_jax.training.ahead_of_time import OUT_OF_MEMORY, Job, compile_step, replicated, shortage, stack_gathers
from gt_jax.training.divisibility import indivisible_fields, indivisible_tensors, refuse_indivisible
from gt_jax.training.pod_plans import least_by_part, part_by_part, part_lines
from tests.support import small_model

ROOT = Path(__file__).parents[2]


def test_topologies_by_name():
    assert topologies.parse("v5p:4x4x4").devices == 64 and topologies.parse("tpu7x:2x2x1").devices == 8
    assert topologies.parse("v5p:8x16x16").devices == 2048
    for name in ("v5p:3x3x3", "v6e:4x4x4", "v4:2x2x2", "v5p", "v5p:32x32x32", "v6e:16x32"):
        with pytest.raises(Refused, match="does not exist"):
            topologies.parse(name)


def machine(memory=95 << 30, link=1.8e11):
    """As v5p, each axis of a mesh on two links of its own, and as fast as four."""
    every = lambda sizes: {axis: (2 * link if size > 1 else np.inf, size > 1) for axis, size in sizes.items()}  # noqa: E731
    return mesh_search.Machine(459e12, 2765e9, memory, every)


def test_meshes_divide_what_they_cut_and_those_that_fit_come_in_the_order_of_their_largest_time():
    job = Job(preset("8b"), 128, 4096)
    found = mesh_search.candidates(job, 64, 8_309_921_685, machine())
    assert found and [c.cost for c in found] == sorted(c.cost for c in found)
    for one in found:
        assert np.prod(list(one.sizes.values())) == 64 and one.cost == max(one.seconds.values())
        assert one.seconds[one.bound] == one.cost and one.memory < 95 << 30
        rows = 128 // one.accumulate
        assert not indivisible_fields(job.model, rows, one.sizes, Rules())
        assert rows % (one.sizes["data"] * one.sizes["fsdp"]) == 0
    assert not mesh_search.candidates(Job(preset("8b"), 7, 4096), 64, 1, machine())
    # a layer's experts may be gathered whole: no stream is held by several devices, none is summed
    assert found[0].sizes["tensor"] == found[0].sizes["expert"] == 1 and found[0].bound == "flops"
    slow = mesh_search.candidates(job, 64, 8_309_921_685, machine(link=2e9))
    assert slow[0].bound == "links" and slow[0].cost > found[0].cost
    small = mesh_search.candidates(job, 64, 8_309_921_685, machine(memory=14 << 30))
    assert small[0].memory < 14 << 30 < found[0].memory and small[0].accumulate > found[0].accumulate
    whole = mesh_search.candidates(job, 64, 8_309_921_685, machine(memory=14 << 30), fixed=True)
    assert {one.accumulate for one in whole} == {1}  # --accumulate 1 means one part, even where none fits
    fit = [one.memory < 14 << 30 for one in small]
    assert fit == sorted(fit, reverse=True) and not fit[-1]  # those that seem too large come last


def test_the_estimate_is_near_what_was_compiled():
    """Of `8b` on four pods: HBM bytes within a quarter, or meshes with a tensor axis are ranked wrongly."""
    stored = [ROOT / f"experiments/results/plan_pod_{name}.json"
              for name in ("v5p_4x4x4", "v5p_8x16x16", "v6e_16x16", "tpu7x_4x4x4")]  # fmt: skip
    for plan in map(json.loads, map(Path.read_text, stored)):
        row = plan["tried"][0]
        job = Job(preset("8b"), plan["batch"], plan["sequence_length"])
        one = mesh_search.estimate(job, row["mesh"], row["accumulate"], plan["parameters"], machine())
        assert 0.75 < one.seconds["bytes"] * machine().bandwidth / row["bytes"] < 1.25, plan["topology"]
        assert 1 < one.memory / row["memory"]["total"] < 2, plan["topology"]  # rather too much: it has to fit
        least, seconds = row["least_seconds"], part_by_part(row)
        assert max(least["flops"], least["bytes"]) < seconds < least["flops"] + least["bytes"]
        assert f"part by part, the larger of arithmetic and HBM: {seconds:.3g} s; " in part_lines(row)[-1]


def test_public_hybrids_have_a_mesh_of_a_pod():
    """Among them that which docs/pods.md names; the first one fits."""
    for name, parameters, sizes in (("qwen3_5_9b", 8_953_803_296, (1, 32, 1, 2)),
                                    ("olmo_hybrid_7b", 7_430_870_720, (1, 64, 1, 1)),
                                    ("qwen3_5_35b_a3b", 34_660_610_728, (1, 32, 1, 2)),
                                    ("qwen3_next_80b_a3b", 79_674_391_344, (1, 32, 1, 2))):  # fmt: skip
        found = mesh_search.candidates(Job(preset(name), 128, 4096), 64, parameters, machine())
        assert (*sizes, 1) in [(*one.sizes.values(), one.accumulate) for one in found], name
        assert found[0].memory < machine().memory, name


def test_what_does_not_divide_names_the_field_the_tensors_and_the_axis():
    """Where the fields say that all divides, all tensors do."""
    lines = indivisible_fields(preset("8b"), 8, {"expert": 3}, Rules())
    assert lines == ["moe.experts is 20; the mesh cuts it in 3 (expert)"]
    waves = preset("tiny").replace(layout="B", resolvent=ResolventConfig(heads=2))
    assert "resolvent.heads is 2; the mesh cuts it in 4 (tensor)" in indivisible_fields(
        waves, 8, {"tensor": 4}, Rules())  # fmt: skip
    unused = preset("tiny").replace(layout="D*8")
    assert not indivisible_fields(unused, 8, {"tensor": 4}, Rules()), "heads of mixers that no layer has cut nothing"
    model = preset("tiny_3b").plain.replace(layout="DG")
    sizes = {"data": 1, "fsdp": 4, "expert": 3, "tensor": 2}
    with pytest.raises(Refused) as error, jax.set_mesh(make_mesh(fsdp=8)):  # whatever the mesh of the moment
        refuse_indivisible(model, 6, sizes, "no:", Rules())
    lines = str(error.value).splitlines()
    assert lines[:3] == ["no:", "  - batch (rows that run together) is 6; the mesh cuts it in 4 (data x fsdp)",
                         "  - moe.experts is 8; the mesh cuts it in 3 (expert)"]  # fmt: skip
    assert lines[3].startswith("  - params/mtp/layer/mlp/experts/down/w: axis 0 of [8, ")
    assert lines[6:] == [f"  - params/segment0/layer0/mlp/experts/{name}/w and 1 like it: axis 1 of [1, 8, {shape}] "
                         "is 8; the mesh cuts it in 3 (expert)"
                         for name, shape in (("down", "32, 64"), ("gate", "64, 32"), ("up", "64, 32"))]  # fmt: skip
    fitting = {"data": 2, "fsdp": 4, "expert": 8, "tensor": 2}
    assert not indivisible_fields(model, 8, fitting, Rules()) and not indivisible_tensors(model, fitting, Rules())


def test_a_mesh_in_words():
    assert mesh_sizes("tensor=2,fsdp=2", 4) == {"data": 1, "fsdp": 2, "expert": 1, "tensor": 2}
    with pytest.raises(Refused) as error:
        mesh_sizes("rows=2,fsdp=2,fsdp=2,tensor=0", 2)
    assert all(part in str(error.value) for part in (
        "--mesh has 'rows=2'; it must be AXIS=SIZE with axes data, fsdp", "fsdp twice", "'tensor=0'"))  # fmt: skip
    with pytest.raises(Refused, match="--mesh fsdp=3 is for 3 devices; the topology has 4, so the sizes must multiply"):
        mesh_sizes("fsdp=3", 4)


def test_a_batch_that_no_mesh_divides_is_refused_with_one_that_has_a_mesh():
    model, arguments = small_model("D", adaptive=False), parser().parse_args(["--topology", "v5p:2x2x1"])
    with pytest.raises(Refused, match="no mesh of 4 devices divides batch 7 and the model evenly; --batch 4, or a mul"):
        chosen(arguments, Job(model, 7, 128), 4, machine())
    with pytest.raises(Refused, match="neither does any other batch"):
        chosen(arguments, Job(model.replace(width=24), 64, 128), 64, machine())  # nor 24 by 16, nor 2 heads by 8


@pytest.mark.slow
def test_a_step_is_measured_where_it_is_compiled():
    """On the CPU's devices, as it would be for a pod."""
    job = Job(small_model("D"), 8, 16, accumulate=2)
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    row = compile_step(job, mesh, memory=1 << 30, link_seconds=lambda group: 1e-12 * len(group))
    assert row["fits"] and row["replicated"] == [] and row["whole_stacks"] == []
    memory = row["memory"]
    assert memory["total"] == sum(memory[name] for name in ("arguments", "outputs", "temporaries", "program"))
    assert row["collectives"]["all-gather"]["bytes"] > 0 and row["largest"][0]["bytes"] > 0
    assert row["state"] <= memory["arguments"] and row["loops_counted_once"] == 0 and row["kernels"] == 0
    # the weights' products alone take forward and backward what the model counts; what XLA does beyond is recomputed,
    # masked, or work of the chunks
    flops, one = model_flops(job.model, 16), row["one_pass"]
    counted, once = (flops.training([float(passes)]) * 8 * 16 / 4 for passes in (one["of"], 1))
    assert counted < row["flops"] < 4 * counted and row["bytes"] > memory["arguments"]
    # three of four passes less: what they cost is what they are
    assert one["of"] == 4 and once < one["flops"] < 4 * once and counted - once < row["flops"] - one["flops"]
    assert all(0 < one[name] < row[name] for name in ("bytes", "links", "link_seconds"))
    row |= least_seconds(row, 2765e9, "TPU v5")
    assert row["least_seconds"] == {"flops": row["flops"] / 459e12, "bytes": row["bytes"] / 2765e9,
                                    "links": row["link_seconds"]}  # fmt: skip
    assert row["bound"] == max(row["least_seconds"], key=row["least_seconds"].get)
    assert row["links"] == sum(one["received"] for one in row["collectives"].values()) > 0
    for what in ("bytes", "flops", "links"):
        assert sum(one[what] for one in row["parts"]) == row[what]
    named = {one["part"] for one in row["parts"]}
    assert {"D mixers", "loss", "optimizer", "embedding", "norms", "gradients summed"} <= named
    result = {"preset": "small", "parameters": 1, "topology": "cpu", "devices": 4, "batch": 8, "sequence_length": 16,
              "tried": [row, row | {"fits": False}]}  # fmt: skip
    text = "\n".join(report_lines(json.loads(json.dumps(result))))
    ends = (row["least_seconds"]["flops"] * share for share in (one["flops"] / row["flops"], 1))
    first, last = (f"{end:.2g} / " for end in ends)
    assert f"by passes a layer that are computed, least s by flops / bytes / links: 1: {first}" in text
    assert f"; 4: {last}" in text
    assert "fits" in text and "DOES NOT FIT" in text and "--accumulate 4" in text
    assert f"{row['flops']:.3g} FLOP of matrix products, at least {row['flops'] / 459e12:.3g} s" in text


def test_what_would_help():
    row = {"accumulate": 1, "memory": {"total": 3 << 30, "of": 2 << 30}, "short_by": 1 << 30, "state": 2 << 30}
    assert advice(row)[0] == "  1.00 GiB too much"
    assert advice(row)[1].startswith("  the state alone takes 2.00 GiB, more than half")
    small = row | {"state": 1 << 20}
    assert "--accumulate 2" in advice(small)[-1] and "--remat layer" in advice(small)[-1]
    assert advice(small | {"device_rows": 1, "remat": "layer"})[-1] == "  what would help: more devices, shorter rows"


def test_what_the_compiler_says_of_missing_memory():
    """Its own words, of this version and of earlier ones; a kernel's VMEM is another matter."""
    said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.66G) " \
           "exceeds available HBM (15.75G)."  # fmt: skip
    found = shortage(said)
    assert found["needed"] == round(18.66 * 2**30) and found["available"] == round(15.75 * 2**30)
    assert found["short_by"] == found["needed"] - found["available"]
    row = {"fits": False, "error": said, "accumulate": 2, "state": 1 << 20, **found}
    assert advice(row)[0] == "  2.91 GiB too much" and "--accumulate 4" in advice(row)[1]
    used = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 27.5G " \
           "of 15.48G hbm. Exceeded hbm capacity by 12.02G."  # fmt: skip
    assert shortage(used) == {"needed": round(27.5 * 2**30), "available": round(15.48 * 2**30),
                              "short_by": round(27.5 * 2**30) - round(15.48 * 2**30)}  # fmt: skip
    assert OUT_OF_MEMORY.search(said) and OUT_OF_MEMORY.search(used)
    assert not OUT_OF_MEMORY.search("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 80M of 64M vmem")
    assert shortage("RESOURCE_EXHAUSTED: Out of memory") == {}


def test_a_large_tensor_that_every_device_holds_is_named():
    with jax.set_mesh(make_mesh(fsdp=8)):
        mesh = jax.sharding.get_mesh()
        spec = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))  # noqa: E731
        shape = (8, 4 << 20)
        tree = {"cut": jax.ShapeDtypeStruct(shape, "float32", sharding=spec("fsdp")),
                "whole": jax.ShapeDtypeStruct(shape, "float32", sharding=spec()),
                "small": jax.ShapeDtypeStruct((8,), "float32", sharding=spec())}  # fmt: skip
    assert replicated(tree) == [{"path": "whole", "bytes": 128 << 20}]


def command(*words):
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, "-m", "gt_jax.plan_pod", *words], capture_output=True, text=True,
                          env=environment, timeout=500)  # fmt: skip


@pytest.mark.slow
@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a TPU as a mesh asks for."""

    id: int
    coords: tuple[int, ...]
    slice_index: int
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"


def torus(*shape, slices=1):
    """So many slices of that shape."""
    places = list(np.ndindex(*shape))
    return [Device(i + len(places) * number, at, number) for number in range(slices) for i, at in enumerate(places)]


def test_an_axis_may_be_a_part_of_an_axis_of_the_torus():
    """v6e:16x16 has no axis of 4: neighbours on `tensor` are neighbours on the torus all the same."""
    mesh = make_mesh(fsdp=64, tensor=4, devices=torus(16, 16, 1))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 64, "expert": 1, "tensor": 4}
    coordinates = np.array([[device.coords for device in row] for row in mesh.devices.reshape(64, 4)])
    assert len(np.unique(coordinates.reshape(-1, 3), axis=0)) == 256
    assert np.all(np.ptp(coordinates, axis=1).sum(axis=-1) == 3)


def test_of_several_slices_data_alone_goes_from_one_to_the_other():
    there = torus(4, 4, 1, slices=2)
    placed = make_mesh(data=4, fsdp=4, tensor=2, devices=there).devices
    slices = np.vectorize(lambda device: device.slice_index)(placed).reshape(4, -1)
    assert np.all(slices == np.array([[0], [0], [1], [1]])) and len(set(placed.flat)) == 32
    assert make_mesh(fsdp=4, devices=there).shape["data"] == 8
    with pytest.raises(Refused, match="2 slices of 16; data is 1, and must be a multiple of 2"):
        make_mesh(data=1, fsdp=32, devices=there)
    with pytest.raises(Refused, match="of 2 slices, 16, 8 of each; as many of every slice are needed"):
        make_mesh(fsdp=24, devices=there[:24])
    pod = topologies.parse("v6e:4x4", 2)
    assert pod.devices == 32 and pod.slice_rate == 1.25e10 and topologies.parse("tpu7x:2x2x1", 3).devices == 24
    rates = pod.axis_rates(make_mesh(data=4, fsdp=8, devices=there))
    assert rates["data"][0] == 2 * 1.25e10 and rates["fsdp"][0] >= 9e10  # two devices of a slice share what goes out
    one = pod.link_seconds(make_mesh(data=4, fsdp=8, devices=there).devices.flatten().tolist())
    assert one(range(8)) == topologies.parse("v6e:4x4").link_seconds(there[:16])(range(8)) > 0
    for words, why in ((("v6e:4x4", 0), "--slices is 0"), (("h100:8", 2), "--slices 2 is of TPUs")):
        with pytest.raises(Refused, match=why):
            topologies.parse(*words)
    found = mesh_search.candidates(Job(preset("8b"), 256, 4096), 128, 8_309_921_685, machine(), 2)
    assert found and all(one.sizes["data"] % 2 == 0 for one in found)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_a_tiny_model_for_a_real_topology():
    words = ("--preset", "tiny_8b", "--topology", "v5p:2x2x1", "--batch", "8", "--sequence-length", "128", "--json")
    done = command(*words, "--mesh", "fsdp=2,tensor=2")
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout)["tried"][0]
    assert row["fits"] and row["memory"]["free_share"] > 0.9 and row["collectives"]
    assert command(*words, "--mesh", "fsdp=3").returncode == 2
    done = command(*words, "--slices", "2", "--mesh", "data=2,fsdp=2,tensor=2")
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout)["tried"][0]
    # each device hands on its share of the gradients in float32; small matrices cross before they are scattered
    share = 4 * json.loads(done.stdout)["parameters"] / 4
    assert share < row["between_slices"] < 8 * share
    assert row["least_seconds"]["between_slices"] == row["between_slices"] / 6.25e9


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is installed")
def test_without_the_compiler_it_says_what_to_install():
    done = command("--topology", "v5p:4x4x4")
    assert done.returncode == 2 and "pip install 'gt-jax[tpu]'" in done.stderr


def stored(**changes):
    """A plan as plan_pod --json has it, as far as a reader asks."""
    numbers = (("experts", "forward", 600, 50, 30, 0.3), ("experts", "backward", 200, 50, 10, 0.1),
               ("loss", "forward", 200, 100, 0, 0.0))  # fmt: skip
    names = ("part", "phase", "bytes", "flops", "links", "link_seconds")
    parts = [dict(zip(names, one, strict=True)) for one in numbers]
    row = {"mesh": {"data": 1, "fsdp": 4, "expert": 1, "tensor": 1}, "accumulate": 1, "fits": True, "bytes": 1000,
           "flops": 200, "links": 40, "collectives": {}, "parts": parts, "memory": {"total": 1 << 30},
           "least_seconds": {"flops": 0.1, "bytes": 2.0, "links": 0.4}, "bound": "bytes"}  # fmt: skip
    plan = {"preset": "8b", "topology": "v5p:2x2x1", "devices": 4, "parameters": 10, "changed": {}, "batch": 8,
            "sequence_length": 16, "tried": [row]}  # fmt: skip
    return plan | changes


def written(folder, **plans):
    for name, plan in plans.items():
        (folder / f"{name}.json").write_text(json.dumps(plan))
    return [str(folder / f"{name}.json") for name in plans]


def test_two_plans_are_compared_part_by_part(tmp_path, capsys):
    half = stored()
    half["tried"] = [half["tried"][0] | {"bytes": 400, "parts": half["tried"][0]["parts"][1:]}]
    assert main(written(tmp_path, before=stored(), after=half)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["experts", "8e-07", "2e-07", "0.25"] in lines and ["loss", "2e-07", "2e-07", "1.00"] in lines
    assert ["least", "s", "by", "bytes", "2", "2", "1.00"] in lines
    picture = tmp_path / "parts.png"
    assert main([*written(tmp_path, before=stored()), "--picture", str(picture)]) == 0
    with pytest.raises(Refused, match="exists"):
        main([*written(tmp_path, before=stored()), "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG") and "together" in capsys.readouterr().out
    assert least_by_part(stored()["tried"][0], "bytes") == {"experts": pytest.approx(1.6), "loss": pytest.approx(0.4)}
    assert least_by_part(stored()["tried"][0], "links") == {"experts": pytest.approx(0.4), "loss": 0.0}


def test_an_old_plan_is_read_and_said_to_be_old(tmp_path, capsys):
    row = {key: value for key, value in stored()["tried"][0].items() if key not in ("parts", "links", "bound")}
    old = {key: value for key, value in stored().items() if key != "changed"}
    old["tried"] = [row | {"least_seconds": {"flops": 0.1, "bytes": 2.0}}]  # as version 0.2.0 wrote it
    other, old = written(tmp_path, other=old, old=old)
    assert main([other, old]) == 0
    said = capsys.readouterr().out
    assert said.count("is an old plan: it has no parts") == 2 and "least s by links" in said
    assert main([old]) == 0 and "old plan" in capsys.readouterr().out
    with pytest.raises(Failed, match="an old plan has no parts"):
        main([old, "--picture", str(tmp_path / "no.png")])


def test_what_is_no_plan_or_of_another_model_is_refused(tmp_path):
    row = stored()["tried"][0]
    bad = written(tmp_path, list=[1], empty=stored(tried=[]), unfit=stored(tried=[row | {"fits": False}]),
                  config={"width": 3}, words=stored(devices="4", slices=None),
                  part=stored(tried=[row | {"parts": [{"part": 1}]}]),
                  axis=stored(tried=[row | {"mesh": {"fsdp": "4"}, "memory": {"total": None}, "least_seconds": [1]}]),
                  sums=stored(tried=[row | {"links": {}, "parts": [row["parts"][0] | {"kernels": "1"}],
                                            "memory": {"total": 10**400}}]),
                  signs=stored(preset="3b\x1b[2J"), devices=stored(devices=-4),
                  negative=stored(tried=[row | {"bytes": -1}]),
                  parts=stored(tried=[row | {"accumulate": 0}]))  # fmt: skip
    for path, words in zip(bad, ("is no JSON object", "has no mesh in tried", "none of its meshes fits",
                                 "lacks preset", r"has a devices of another type(.|\n)*has a slices of another type",
                                 r"tried\[0\] parts\[0\] has a part of another type",
                                 r"a least_seconds that is no JSON object\n.* mesh has a fsdp that is no number from "
                                 r"0: '4'\n.* memory has a total that is no number from 0: None",
                                 r"has a links that is no number from 0: \{\}\n.* memory has a total that is no number "
                                 r"from 0: 1000(.|\n)*has a kernels that is no number from 0: '1'",
                                 r"has a preset that is no line of text: '3b\\x1b\[2J'",
                                 r"has devices -4; there is one at least", r"tried\[0\] has a bytes that is no number",
                                 r"tried\[0\] has accumulate 0"), strict=True):  # fmt: skip
        with pytest.raises(Refused, match=words):
            main([path])
    (tmp_path / "text.json").write_text("fsdp=4")
    with pytest.raises(Refused, match="cannot be read as JSON"):
        main([str(tmp_path / "text.json")])
    one, other = written(tmp_path, one=stored(), other=stored(preset="3b", parameters=11, batch=16))
    with pytest.raises(Refused) as error:
        main([one, other])
    assert all(part in str(error.value) for part in ("preset: 8b in", "3b in", "parameters: 10", "rows of a batch: 8"))
    for words, why in (([one, one, one], "3 plans are named"), ([one, one], "compared with itself"),
                       ([one, "--topology", "v5p:2x2x1"], "leave out --topology$"),
                       ([one, "--mesh", "fsdp=7", "--tries", "0", "--remat", "none"], "--remat and --mesh and --tries"),
                       (["--topology", "v5p:2x2x1", "--slices", "2", "--mesh", "fsdp=8"], "data is 1, which goes from"),
                       ([], "--topology is missing")):  # fmt: skip
        with pytest.raises(Refused, match=why):
            main(words)


def test_a_gather_of_all_layers_at_once_is_named_one_of_a_layers_experts_is_not(monkeypatch):
    leaf = jax.ShapeDtypeStruct((5, 20, 4096, 1024), "bfloat16")
    shapes = {"params": {"segment0": {"layer0": {"w": leaf}}, "embedding": {"w": leaf}}}
    monkeypatch.setattr("gt_jax.training.ahead_of_time.abstract", lambda model: shapes)
    lines = [f'  %g{n} = bf16[{shape}]{{0}} all-gather(%x), dimensions={{1}}, metadata={{op_name="{name}"}}\n'
             for n, (name, shape) in enumerate((("layer", "1,20,4096,1024"), ("all", "5,20,4096,1024"),
                                                ("all, cut", "5,20,4096,256"), ("small", "5,20,4096,4")))]  # fmt: skip
    text = f"ENTRY %main (x: bf16[4]) -> bf16[4] {{\n  %x = bf16[4]{{0}} parameter(0)\n{''.join(lines)}}}\n"
    assert stack_gathers(hlo.read(text), preset("8b")) == ["all", "all, cut"]
