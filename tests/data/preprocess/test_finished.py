"""``--resume`` where the run has finished: a job that is requeued has nothing to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.preprocessing import FILES, TEXTS, names, to_lines

pytestmark = pytest.mark.usefixtures("chunks_of_20_bytes")


@pytest.fixture
def finished(tmp_path: Path, run: Callable) -> list[object]:
    """Run the tool with ``--resume`` to its end; return its flags."""
    (tmp_path / "in.jsonl").write_bytes(to_lines(TEXTS))
    flags = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--resume"]
    flags += ["--tokenizer-type", "NullTokenizer"]
    code, stderr = run(*flags)
    assert code == 0, stderr
    assert names(tmp_path) == FILES
    return flags


@pytest.mark.parametrize("more", [[], ["--workers", 2, "--on-error", "quarantine"]])
def test_resume_of_what_has_finished(
    tmp_path: Path, finished: list[object], run: Callable, more: list[object]
) -> None:
    """A script may always pass it."""

    def written() -> dict[str, tuple[int, int]]:  # not when it was read, which changes
        stats = {name: (tmp_path / name).stat() for name in names(tmp_path)}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}

    before = written()
    assert sorted(before) == sorted(FILES)
    code, stderr = run(*finished, *more)
    assert (code, stderr) == (
        0,
        f"Nothing to do: the run has finished before: {tmp_path}/out_text_document\n",
    )
    assert written() == before


def test_resume_of_numbered_datasets_that_have_finished(
    tmp_path: Path, finished: list[object], run: Callable
) -> None:
    flags = [*finished, "--max-bin-size", 40, "--json-keys", "text", "text"]
    code, stderr = run(*flags)
    assert code == 0, stderr
    assert "Wrote" in stderr
    code, stderr = run(*flags)
    assert code == 0, stderr
    assert "Nothing to do" in stderr
    last = max(tmp_path.glob("out_text_document_*.bin"))
    assert not last.stem.endswith("_00000")
    for suffix in (".bin", ".idx", ".json"):
        last.with_suffix(suffix).unlink()
    code, stderr = run(*flags)
    assert code == 1
    assert last.stem in stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["--append-eod"], "--append-eod was False and is True"),
        (["--shard", "0/2"], r"--shard was \[0, 1\] and is \[0, 2\]"),
        (["--input", "-"], "a pipe cannot be read again"),
    ],
)
def test_another_command_has_finished(
    tmp_path: Path, finished: list[object], refused: Callable[..., str], change: list[object], reason: str
) -> None:
    message = refused(*finished, *change)
    assert re.search(rf"out_text_document.bin exists, and not by this command: {reason}.*; choose", message)
    assert names(tmp_path) == FILES


def test_another_input_has_finished(
    tmp_path: Path, finished: list[object], refused: Callable[..., str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(to_lines(["other"]))
    assert "out_text_document.bin exists, and not by this command: the input was [[" in refused(*finished)


def test_what_has_finished_is_looked_at(
    tmp_path: Path, finished: list[object], run: Callable, refused: Callable[..., str]
) -> None:
    """It counts only with its sidecar, which knows the plan, and with all its bytes."""
    bin_, sidecar = tmp_path / "out_text_document.bin", tmp_path / "out_text_document.json"
    whole, known = bin_.read_bytes(), sidecar.read_text()
    bin_.write_bytes(whole[:-2])
    assert "out_text_document.bin: truncated" in refused(*finished)
    bin_.write_bytes(whole)
    sidecar.write_text(json.dumps({**json.loads(known), "plan": {}}))
    assert "not by this command: nothing tells how it was made" in refused(*finished)
    sidecar.unlink()
    assert "out_text_document.bin exists: choose another" in refused(*finished)
    code, stderr = run(*finished, "--overwrite")
    assert code == 0, stderr
    assert "Wrote" in stderr
