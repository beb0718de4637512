"""The switch that runs the suite on a GPU, as far as it can be tested without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import on_a_gpu

TESTS = Path(__file__).parent


def test_every_exclusion_is_of_a_test_that_there_is():
    for name in on_a_gpu.LEFT_OUT:
        file, _, function = name.partition("::")
        text = (TESTS / file).read_text(encoding="utf-8")
        assert not function or re.search(rf"^def {function}", text, re.MULTILINE), name


def test_tests_of_meshes_run_where_there_are_as_many_cards():
    names = ["models/layers/test_moe.py::test_a_mesh_gives", "training/test_several_processes.py::test_x", "a.py"]
    one, eight = (dict(on_a_gpu.left_out(names, cards)) for cards in (1, 8))
    assert one == {0: on_a_gpu.MESH, 1: on_a_gpu.PROCESSES} and eight == {1: on_a_gpu.PROCESSES}


def test_a_platform_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv(on_a_gpu.SWITCH, "tpu")
    with pytest.raises(ValueError, match="is 'tpu'; it is one of cpu, gpu"):
        on_a_gpu.platform()


def test_without_a_gpu_nothing_runs_on_a_cpu_instead():
    environment = {**os.environ, on_a_gpu.SWITCH: "gpu"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", "tests/test_options.py"]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 4 and "JAX finds no GPU" in done.stdout + done.stderr
