"""Whatever ends a run, and whenever, the next one goes on and gives the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_periln.data.indexed.sidecar import sha256_of
from megatron_periln.data.tokenizers.megatron_tokenizer import add_tokenizer_args
from megatron_periln.data.tokenizers.resolve import resolve_tokenizer
from tests.data.preprocessing import FILES, by_megatron, names, read, to_lines

pytestmark = pytest.mark.usefixtures("hangs_fail")
SLOW = Path(__file__).parents[1] / "slow_preprocess.py"
KEYS = ("text", "title")
DOCUMENTS = [{"text": f"text {n} {'x' * (n % 7)}", "title": f"title {n}"[: n % 9]} for n in range(40)]


@pytest.fixture
def flags(tmp_path: Path, tokenizers: dict[str, list[str]]) -> list[str]:
    """The flags of a run; its tokenizer is in the cache."""
    resolve_tokenizer(add_tokenizer_args(ArgumentParser()).parse_args(tokenizers["huggingface"]))
    lines = [json.dumps(document) + "\n" for document in DOCUMENTS]
    (tmp_path / "in.jsonl").write_text("".join([*lines[:20], "bad\n", *lines[20:]]))
    flags = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--append-eod"]
    more = ["--json-keys", *KEYS, "--workers", "2", "--on-error", "quarantine", "--max-bin-size", "300"]
    return [*map(str, flags), *more, *tokenizers["huggingface"]]


def start(flags: list[str], *, seconds: float = 0.015, chunk: int = 60, **options: Any) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SLOW, str(chunk), str(seconds), *flags],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore SIGINT, and so would the processes that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def wait_for(journal: Path, process: subprocess.Popen, chunks: int = 1) -> None:
    """Wait until a run has noted some chunks, or has ended."""
    while process.poll() is None:
        with suppress(FileNotFoundError):
            if journal.read_text().count("\n") >= chunks:
                return
        time.sleep(0.005)


def children(process: subprocess.Popen) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    return []


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of what a run wrote, but for what differs between runs; check the checksums."""
    for sidecar in folder.glob("out*.json"):
        expected = json.loads(sidecar.read_text())["sha256"]
        assert {name: sha256_of(sidecar.with_suffix(f".{name}")) for name in ("bin", "idx")} == expected
    files = [path for path in folder.glob("out*") if path.name != "out.partial.removed"]
    return {path.name: path.read_bytes() for path in files if path.suffix != ".json"}


def test_twenty_kills(tmp_path: Path, flags: list[str]) -> None:
    """Of the tool, of all its processes or of a worker, at any moment; 20 in all or more, over some runs."""
    undisturbed = start(flags, seconds=0)
    stderr = undisturbed.communicate()[1]
    assert undisturbed.returncode == 0, stderr
    expected = contents(tmp_path)
    assert len(expected) > 2 * 2 * len(KEYS)

    chance = random.Random(time.time_ns())
    journal = tmp_path / "out.partial" / "journal"
    kills = resumed = 0
    while (more := kills < 20 or resumed < 4) or (tmp_path / "out.partial").exists():
        assert kills < 200, "hardly a run was killed between its start and its end"
        if not (tmp_path / "out.partial").exists():
            shutil.rmtree(tmp_path / "out.partial.removed", ignore_errors=True)
            for path in tmp_path.glob("out*"):
                path.unlink()
        process = start([*flags, "--resume"])
        if more:
            at_start = chance.random() < 0.2
            wait_for(journal, process, 0 if at_start else chance.randrange(1, 50))
            time.sleep(chance.random() * 0.01)
            workers = children(process)
            match chance.randrange(4):
                case 0 if workers:
                    with suppress(ProcessLookupError):
                        os.kill(chance.choice(workers), signal.SIGKILL)
                    wait_for(journal, process, chance.randrange(1, 50))
                    process.kill()
                case 1:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                case _:
                    process.kill()
            kills += 1
        stderr = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), stderr
        if process.returncode == 0:
            assert contents(tmp_path) == expected
        else:
            resumed += journal.exists() and journal.read_text().count("\n") > 0


@pytest.mark.parametrize("to_all", [False, True])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(tmp_path: Path, flags: list[str], number: int, code: int, to_all: bool) -> None:
    """To the tool, or as a terminal and a scheduler do to its workers too; one line says what to do."""
    process = start(flags)
    wait_for(tmp_path / "out.partial" / "journal", process, 10)
    workers = children(process)
    (os.killpg if to_all else os.kill)(process.pid, number)
    stderr = process.communicate()[1]
    assert process.returncode == code
    if number == signal.SIGINT:
        assert stderr == "interrupted: what is done is kept: go on with --resume\n"
    assert names(tmp_path) == ["out.partial"]
    assert workers
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    process = start([*flags, "--resume"], seconds=0)
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    assert len(contents(tmp_path)) > 2 * len(KEYS)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_pipe_leaves_nothing(tmp_path: Path, flags: list[str], number: int, code: int) -> None:
    """What came through it cannot be read again."""
    process = start([*flags, "--input", "-"], stdin=subprocess.PIPE)
    assert process.stdin
    process.stdin.write("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    process.stdin.flush()
    wait_for(tmp_path / "out.partial" / "journal", process, 3)
    os.kill(process.pid, number)
    stderr = process.communicate()[1]
    assert process.returncode == code
    assert stderr == ("interrupted: nothing was written\n" if code == 130 else "")
    assert names(tmp_path) == []


class Crash:
    """Ends this process at one of the steps in which files change, as if the power had failed."""

    STEPS = ("fsync", "unlink", "rename", "replace", "mkdir", "rmdir")

    def __init__(self, at: int) -> None:
        self.at, self.steps, self.process = at, 0, os.getpid()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in self.STEPS:
            patch.setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, step: Callable) -> Callable:
        def watch(*args: Any, **options: Any) -> Any:
            if os.getpid() == self.process:
                if self.steps == self.at:
                    os._exit(9)
                self.steps += 1
            return step(*args, **options)

        return watch


def test_every_step(
    tmp_path: Path, tool: Any, stub: Callable, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends at each step in turn: an old dataset stays until the new one is there; --resume finishes."""
    stub(lambda text: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes long
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 20)
    (tmp_path / "in.jsonl").write_bytes(b"bad\n" + to_lines(["a", "b"]))
    old, new = (by_megatron(tmp_path / "reference", texts) for texts in (["old"], ["a", "b"]))
    prefix, partial = tmp_path / "out_text_document", tmp_path / "out.partial"
    argv = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out"), "--workers", "2"]
    argv += ["--on-error", "quarantine"]
    finished = sorted([*FILES, "out_quarantine.jsonl"])

    def end_at(step: int) -> int | None:
        with pytest.MonkeyPatch.context() as patch:
            crash = Crash(step)

            def main() -> None:
                crash.process = os.getpid()
                crash.install(patch)
                os._exit(tool.main([*argv, "--overwrite"]))

            process = multiprocessing.get_context("fork").Process(target=main)
            process.start()
            process.join()
            return process.exitcode

    for step in range(100):
        for path in tmp_path.glob("out*"):
            path.unlink()
        Path(f"{prefix}.bin").write_bytes(old[0])
        Path(f"{prefix}.idx").write_bytes(old[1])
        code = end_at(step)
        if code == 0:
            break
        assert code == 9
        if Path(f"{prefix}.idx").exists():
            assert read(prefix) in (old, new)
        if partial.exists():
            code, stderr = run(*argv, "--resume")
            assert code == 0, stderr
        else:
            assert read(prefix) in (old, new)
        if read(prefix) == new:
            assert [name for name in names(tmp_path) if name != "out.partial.removed"] == finished
        shutil.rmtree(tmp_path / "out.partial.removed", ignore_errors=True)
    assert step > 15
    assert read(prefix) == new
