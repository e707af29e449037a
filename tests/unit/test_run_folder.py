"""Who may write to a run's folder."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bnf_align.run.run_folder import RunFolder
from bnf_core.errors import UserError

HOLD = """
import sys
from filelock import FileLock

lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def folder(path: Path) -> RunFolder:
    config = SimpleNamespace(output=str(path), fine_tune_type="lora", keep_checkpoints=1)
    return RunFolder(config)


def test_a_folder_is_held_by_one_run_at_a_time_and_let_go_of(tmp_path: Path) -> None:
    with folder(tmp_path / "run").held():
        assert (tmp_path / "run" / ".lock").exists()
        with pytest.raises(UserError, match="another run is writing to"), folder(tmp_path / "run").held():
            pass
    with folder(tmp_path / "run").held():
        pass


def test_the_system_lets_go_of_the_folder_of_a_run_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another run is writing to"), folder(tmp_path / "run").held():
        pass
    other.kill()
    other.wait()
    with folder(tmp_path / "run").held():
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with folder(tmp_path / "run").held(), folder(tmp_path / "run").held():
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "run", "Not a directory")):
        with pytest.raises(UserError, match=reason), folder(path).held():
            pass
