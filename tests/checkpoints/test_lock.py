"""A lock is ours or refused, unlinked only by who holds it, and taken as long as one process of a job lives."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gt_jax.checkpoints import lock
from gt_jax.checkpoints.lock import lock_file, only_writer
from gt_jax.errors import Refused


def test_a_file_of_the_old_name_is_left_alone(tmp_path: Path) -> None:
    """`uv.lock` of a project, when something is grown to `uv`."""
    (tmp_path / "uv.lock").write_text("version = 1")
    with only_writer(tmp_path / "uv"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".uv.gt_jax-lock", "uv.lock"]
    assert [path.name for path in tmp_path.iterdir()] == ["uv.lock"]
    assert (tmp_path / "uv.lock").read_text() == "version = 1"


@pytest.mark.parametrize("kind", ["text", "folder", "link"])
def test_what_is_no_lock_of_ours_is_refused_and_left(tmp_path: Path, kind: str) -> None:
    path = lock_file(tmp_path / "target")
    if kind == "text":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "elsewhere").write_text("mine")
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match=r"\.target\.gt_jax-lock is not a lock of"), only_writer(tmp_path / "target"):
        pass
    assert os.path.lexists(path)
    assert kind == "folder" or path.read_text() == "mine"


def test_what_a_killed_process_left_is_taken_over(tmp_path: Path) -> None:
    job = "gt_jax lock of job " + 32 * "0"
    for content in ("", job, f"{job}, process 4000000 on a-host-with-quite-a-long-name.example.org\n"):
        lock_file(tmp_path / "target").write_text(content)
        with only_writer(tmp_path / "target"):
            said = lock_file(tmp_path / "target").read_text()
            assert said.startswith("gt_jax lock of job ") and said.endswith(f", {lock._this_process()}\n")
        assert not any(tmp_path.iterdir())


def test_a_second_job_is_refused_and_takes_nothing_away(tmp_path: Path) -> None:
    with only_writer(tmp_path / "target"):
        content = lock_file(tmp_path / "target").read_text()
        for _ in range(2):
            with (pytest.raises(Refused, match=f"another process is writing .*process {os.getpid()} on "),
                  only_writer(tmp_path / "target")):
                pass
        assert lock_file(tmp_path / "target").read_text() == content
    with only_writer(tmp_path / "target"):
        pass
    assert not any(tmp_path.iterdir())


def test_held_as_long_as_one_process_of_the_job_lives(tmp_path: Path) -> None:
    """Process 0 dies; process 1, which writes on, keeps the lock, and unlinks it at its end."""
    target, path = tmp_path / "target", lock_file(tmp_path / "target")
    first = lock._take(path, target)
    second = lock._join(path, target, lock._content(first))
    os.close(first)  # what a kill does
    with pytest.raises(Refused, match="another process is writing"), only_writer(target):
        pass
    lock._let_go(second, path)
    assert not path.exists()
    first = lock._take(path, target)
    second = lock._join(path, target, lock._content(first))
    lock._let_go(first, path)  # process 0 is done first: the file stays for the other
    with pytest.raises(Refused, match="another process is writing"), only_writer(target):
        pass
    lock._let_go(second, path)
    assert not path.exists()


def test_a_process_of_another_job_does_not_join(tmp_path: Path) -> None:
    target, path = tmp_path / "target", lock_file(tmp_path / "target")
    first = lock._take(path, target)
    with pytest.raises(Refused, match="another process is writing"):
        lock._join(path, target, b"gt_jax lock of job " + 32 * b"0")
    lock._let_go(first, path)


def test_a_file_that_was_unlinked_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder unlinks between our open and our flock: locking the nameless file would let a third one in."""
    target, path = tmp_path / "target", lock_file(tmp_path / "target")
    flock, raced = fcntl.flock, []

    def after_an_unlink(file: int, how: int) -> None:
        if not raced:
            raced.append(os.unlink(path))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", after_an_unlink)
    with only_writer(target):
        assert path.exists()
        with pytest.raises(Refused), only_writer(target):
            pass
    assert not path.exists()


def test_another_job_that_comes_between_alone_and_shared_wins_alone(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To hold alone and then shared is two steps; a job that was there in between has written its name."""
    flock = fcntl.flock

    def with_a_visitor(file: int, how: int) -> None:
        if how & fcntl.LOCK_SH:
            os.pwrite(file, b"gt_jax lock of job " + 32 * b"f", 0)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", with_a_visitor)
    with pytest.raises(Refused, match="another process is writing"), only_writer(tmp_path / "target"):
        pass


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    program = ("import os, sys; from pathlib import Path; from gt_jax.checkpoints import lock;"
               "target = Path(sys.argv[1]); lock._take(lock.lock_file(target), target);"
               "print('held', flush=True); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "target")], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
    assert done.returncode == -9 and done.stdout == "held\n", done.stderr
    assert lock_file(tmp_path / "target").exists()
    with only_writer(tmp_path / "target"):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "words"), [
    (errno.EACCES, "another user's.*delete it"), (errno.EPERM, "is not writable"),
    (errno.EROFS, "only be read; choose another place"),
    (errno.ENAMETOOLONG, "choose a shorter target"), (errno.ENOLCK, "gives no locks.*mount the disk with flock"),
    (errno.EOPNOTSUPP, "gives no locks.*choose another place")])
def test_a_lock_that_is_not_possible_is_refused_with_what_would_be_right(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    def fails(*rest: object) -> None:
        raise OSError(number, os.strerror(number))

    of_file = number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
    if number == errno.EACCES:  # else there is no lock, and the folder takes none
        lock_file(tmp_path / "target").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os if of_file else fcntl, "open" if of_file else "flock", fails)
        with pytest.raises(Refused, match=words) as refused, only_writer(tmp_path / "target"):
            pass
    assert str(tmp_path) in str(refused.value)


def test_whether_a_target_is_held_is_told_without_taking_or_leaving_anything(tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert not lock.is_held(target)
    with only_writer(target):
        assert lock.is_held(target) and lock.is_held(target)
        with pytest.raises(Refused, match="another process is writing"), only_writer(target):
            pass
    lock_file(target).write_text("")  # left by a kill
    assert not lock.is_held(target) and lock_file(target).exists()
    with only_writer(target):
        pass
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"), only_writer(tmp_path / "target"):
        pass
    assert not any(tmp_path.iterdir())
