"""`import gt_jax` and `python -m gt_jax`: what a stranger meets first."""

import doctest
import importlib
import subprocess
import sys

import pytest

import gt_jax
from gt_jax import __main__ as entry
from gt_jax.errors import Refused
from tests.test_rooms import COMMANDS


def run(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_import_is_instant_and_brings_nothing():
    heavy = {"jax", "flax", "numpy", "tensorflow", "torch"}
    done = run("-c", f"import sys, gt_jax; print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", sorted(gt_jax.__all__))
def test_every_name_has_an_example_that_runs(name):
    value = getattr(gt_jax, name)
    found = [test for test in doctest.DocTestFinder(recurse=False).find(value, name) if test.examples]
    assert found, f"{name} has no example"
    for test in found:
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


def test_a_command_never_hides_the_function_of_its_name():
    for name in sorted(COMMANDS & set(gt_jax.__all__)):
        command = importlib.import_module(f"gt_jax.{name}")
        assert callable(getattr(gt_jax, name)) and callable(command.main) and getattr(gt_jax, name) is not command
    assert set(gt_jax.__all__) <= set(dir(gt_jax))
    with pytest.raises(AttributeError, match="it has ModelConfig, Rules"):
        _ = gt_jax.nothing


def test_one_entry_lists_all_commands_and_suggests_the_nearest(capsys):
    assert set(entry.COMMANDS) == COMMANDS
    assert entry.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
    assert entry.main(["--version"]) == 0 and capsys.readouterr().out == f"gt_jax {gt_jax.__version__}\n"
    with pytest.raises(Refused, match="did you mean measure"):
        entry.main(["mesure"])
    with pytest.raises(Refused, match="python -m gt_jax lists them"):
        entry.main(["xylophone"])
    with pytest.raises(SystemExit) as left:
        entry.main(["plan-pod", "--help"])
    assert left.value.code == 0 and "topology" in capsys.readouterr().out


def test_the_script_and_the_module_are_one():
    for words in (("-m", "gt_jax", "grow", "--dry-run"), ("-m", "gt_jax.grow", "--dry-run")):
        done = run(*words)
        assert done.returncode == 0 and "DDDG*5" in done.stdout, done.stderr
    done = run("-m", "gt_jax", "grwo")
    assert done.returncode == 2 and "did you mean grow" in done.stderr
