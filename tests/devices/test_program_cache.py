"""Compiled programs in the user's cache: where, whose, what is not whole, and that nothing but a command uses it."""

import argparse
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from gt_jax.devices import program_cache
from gt_jax.devices.program_cache import add_cache_flag, keep_programs, programs_folder

ROOT = Path(__file__).parents[2]
ENTRY = zlib.compress(b"a compiled program" * 100)


def words(*argv):
    parser = argparse.ArgumentParser()
    add_cache_flag(parser)
    return parser.parse_args(argv)


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """What JAX is told, in a process where nobody has decided yet; the suite itself has a folder of its own."""
    told = {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(program_cache, "_is_decided", lambda: False)
    monkeypatch.setattr(program_cache, "_set", lambda option, text, value: told.update({option: value}))
    return told


def test_the_folder_is_the_users_alone_and_follows_the_specification(chosen, monkeypatch, tmp_path):
    keep_programs(words())
    folder = programs_folder()
    assert chosen == {"jax_compilation_cache_dir": str(folder)} and folder.parent == tmp_path / "gt_jax" / "programs"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert programs_folder().parents[2] == tmp_path / "home" / ".cache"
    chosen.clear()
    keep_programs(words("--no-compilation-cache"))
    assert chosen == {"jax_enable_compilation_cache": False} and not (tmp_path / "home").exists()


def test_a_folder_that_cannot_be_used_is_named_and_work_goes_on(chosen, tmp_path, capsys):
    (tmp_path / "gt_jax").write_text("a file stands where the folder would be")
    keep_programs(words())
    (tmp_path / "gt_jax").unlink()
    programs_folder().mkdir(parents=True)
    programs_folder().chmod(0o777)
    keep_programs(words())
    said = capsys.readouterr().err.splitlines()
    assert not chosen and len(said) == 2 and all(line.startswith("compiled programs are not kept: ") for line in said)
    assert str(tmp_path / "gt_jax") in said[0] and "others may write there (--no-compilation-cache" in said[1]


def test_what_a_killed_process_left_is_removed_and_what_was_checked_is_not_read_again(chosen):
    keep_programs(words())
    folder = programs_folder()
    (folder / "whole-cache").write_bytes(ENTRY)
    (folder / "short-cache").write_bytes(ENTRY[:-3])
    (folder / "empty-cache").write_bytes(b"")
    (folder / "old-cache").write_bytes(ENTRY[:-3])
    now = time.time()
    for path in folder.iterdir():  # the last look was between the old one and the others, all a while ago
        at = now - {"old-cache": 300, program_cache._CHECKED: 200}.get(path.name, 100)
        os.utime(path, (at, at))
    keep_programs(words())
    assert {path.name for path in folder.glob("*-cache")} == {"whole-cache", "old-cache"}


def test_above_the_limit_the_oldest_go(chosen, monkeypatch):
    keep_programs(words())
    folder = programs_folder()
    for age in range(4):
        (folder / f"{age}-cache").write_bytes(ENTRY)
        os.utime(folder / f"{age}-cache", (10 - age, 10 - age))
    monkeypatch.setattr(program_cache, "MOST", 2 * len(ENTRY))
    keep_programs(words())
    assert {path.name for path in folder.glob("*-cache")} == {"0-cache", "1-cache"}


def test_a_command_uses_it_and_an_import_does_not(tmp_path):
    """In processes of their own: JAX finds the program of the first in the second."""
    code = """
import os, gt_jax
before = os.listdir(os.environ["XDG_CACHE_HOME"]) if "JAX_COMPILATION_CACHE_DIR" not in os.environ else "decided"
from gt_jax.train import keep_programs, parser
keep_programs(parser().parse_args(["run"]))
import jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append("cache_hits" in event))
jax.jit(lambda x: x * 3 + 1)(2.0)
print(before, any(hits))
"""
    kept = {name: value for name, value in os.environ.items() if name not in (program_cache.DIRECTORY, "XLA_FLAGS")}
    kept |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    found = [subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True).stdout
             for _ in range(2)]  # fmt: skip
    assert found == ["[] False\n", "['gt_jax'] True\n"] and list(tmp_path.rglob("*-cache"))
