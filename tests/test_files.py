"""Files and folders appear whole or not at all; locks end with their process."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_periln import files
from megatron_periln.errors import UsageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    """Until the block ends its old content stands there."""
    path = tmp_path / "a"
    path.write_text("old")
    with files.replacing(path) as (temporary,):
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_block_that_fails_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)), files.replacing(path) as (temporary,):
        temporary.write_text("new")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_of_several_files_the_last_is_never_beside_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, index, stale = (tmp_path / name for name in ("data", "index", "stale"))
    for path in (data, index, stale):
        path.write_text("old")
    seen = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append((target.name, index.exists(), stale.exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    with files.replacing(data, index, stale=[stale]) as temporary:
        for path in temporary:
            path.write_text("new")
    assert seen == [("data", False, False), ("index", False, False)]
    assert (data.read_text(), index.read_text(), names(tmp_path)) == ("new", "new", ["data", "index"])


def test_renaming_that_fails_leaves_none_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader would take what is there for a pair."""
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == "index":
            raise OSError(errno.EIO, "broken")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with (
        pytest.raises(OSError, match="broken"),
        files.replacing(tmp_path / "data", tmp_path / "index") as temporary,
    ):
        for path in temporary:
            path.write_text("new")
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_periln import files
context = {call}
with context as temporary:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "call", ["files.replacing(Path(sys.argv[1]))", "files.new_folder(Path(sys.argv[1]), flag='--output')"]
)
def test_what_a_killed_process_left_goes(tmp_path: Path, call: str) -> None:
    """With the next writer of that name; not what a process holds, nor what has another name."""
    command = [sys.executable, "-c", KILLED.format(call=call), str(tmp_path / "a")]
    assert subprocess.run(command, check=False).returncode == -9
    (left,) = names(tmp_path)
    (tmp_path / "b.1.tmp").touch()
    held = tmp_path / "a.1.tmp"
    held.touch()
    with files.locked(held) as ours:
        assert ours
        files.write_text(tmp_path / "a", "new")
    assert left not in names(tmp_path)
    assert names(tmp_path) == ["a", "a.1.tmp", "b.1.tmp"]


def test_a_folder_takes_the_place_of_another_only_if_asked(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(UsageError, match=r"--output .*/a exists"), files.new_folder(folder, flag="--output"):
        pass
    with files.new_folder(folder, flag="--output", replace=True) as new:
        (new / "new").touch()
        assert names(folder) == ["old"]
    assert (names(folder), names(tmp_path)) == (["new"], ["a"])


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "old").touch()

    def broken(self: Path, target: Path) -> Path:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(Path, "replace", broken)
    with (
        pytest.raises(OSError, match="broken"),
        files.new_folder(folder, flag="--output", replace=True) as new,
    ):
        (new / "new").touch()
    assert (names(folder), names(tmp_path)) == (["old"], ["a"])


def test_a_lock_has_one_owner(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("w") as second:
        assert files.try_lock(first.fileno()) is True
        assert files.try_lock(second.fileno()) is False
        first.close()
        assert files.try_lock(second.fileno()) is True


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_from_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (tmp_path / "lock").open("w") as file:
        assert files.try_lock(file.fileno()) is None
        number = errno.EIO
        with pytest.raises(OSError, match="Input/output error"):
            files.try_lock(file.fileno())
