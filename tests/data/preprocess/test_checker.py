"""The process that checks samples: nothing is placed before its answer, and nobody's death holds up a run."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from megatron_periln.data.preprocess.checker import Checker, InexactEncoderError
from megatron_periln.data.preprocess.workers import Report
from megatron_periln.data.readers.sources import Block
from megatron_periln.data.readers.tasks import Task
from megatron_periln.data.tokenizers.encoders import Encoded, GuardedEncoder
from megatron_periln.data.tokenizers.encoders.gigatoken import GigatokenEncoder
from megatron_periln.data.tokenizers.encoders.libraries import TokenizersEncoder
from megatron_periln.errors import PreprocessError
from tests.data.preprocessing import read, to_lines
from tests.data.tokenizers.encoder_tokenizers import needs_gigatoken
from tests.data.worker_runs import Run, Started, blocks

pytestmark = pytest.mark.usefixtures("hangs_fail")

TEXTS = [f"text {number}" for number in range(8)]
NOTE = "the process that checks a sample of the ids "


def until(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


class Reference:
    """Gives a character's number; notes which process encoded what; acts on texts in the checker."""

    name = "reference"

    def __init__(self, log: Path, act: Callable[[str], None] = lambda text: None) -> None:
        self.log, self.act, self.home = log, act, os.getpid()
        log.touch()

    def load(self) -> None:
        self.note("load")

    def encode(self, texts: list[str]) -> Encoded:
        for text in texts:
            if os.getpid() != self.home:
                self.act(text)
            self.note(text)
        ids = [ord(character) for text in texts for character in text.replace("wrong", "right")]
        return np.array(ids, np.uint32), np.array(list(map(len, texts)), np.int64)

    def note(self, what: str) -> None:
        with self.log.open("a") as stream:
            stream.write(f"{os.getpid()} {what}\n")

    @property
    def noted(self) -> list[tuple[bool, str]]:
        """What was done, and whether in this process."""
        lines = [line.split(" ", 1) for line in self.log.read_text().splitlines()]
        return [(int(process) == self.home, what) for process, what in lines]


class CheckedRun(Run):
    """Nothing is placed that the reference was not asked about."""

    def __init__(self, folder: Path, act: Callable[[str], None] = lambda text: None) -> None:
        super().__init__(folder)
        self.reference = Reference(folder / "log", act)

    def before_place(self, report: Report) -> None:
        seen = [text for _, text in self.reference.noted]
        assert all(text in seen for sample in report.samples for text in sample.texts)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def send_half_and_die(connection: Connection, message: bytes) -> None:
    os.write(connection.fileno(), message[: len(message) // 2])
    kill_self()


class Deaths:
    """Lets a checker die by a text, so often."""

    def __init__(
        self, folder: Path, times: int, die: Callable[[], None] = kill_self, text: str = TEXTS[3]
    ) -> None:
        self.folder, self.times, self.die, self.text = folder, times, die, text

    def __call__(self, text: str) -> None:
        died = self.folder / f"died {len(list(self.folder.glob('died *')))}"
        if text == self.text and died.name != f"died {self.times}":
            died.touch()
            self.die()


def die_while_answering() -> None:
    Connection._send = send_half_and_die  # type: ignore[attr-defined]  # in the checker, a copy of this process


KILLED = f"{NOTE}was killed by SIGKILL, often sent by the kernel for lack of memory: use fewer --workers"


@pytest.mark.parametrize("moment", ["never", "at first", "asked", "asked twice", "answering", "idle"])
def test_the_checker_is_killed(tmp_path: Path, started: Started, moment: str) -> None:
    acts = {
        "asked": Deaths(tmp_path, 1),
        "asked twice": Deaths(tmp_path, 2),
        "answering": Deaths(tmp_path, 1, die_while_answering),
    }
    run = CheckedRun(tmp_path, acts.get(moment, lambda text: None))
    with closing(Checker()) as checker:
        checker.use(run.reference)
        assert len(started()) == 1

        def kill() -> None:
            assert checker._process
            checker._process.kill()
            checker._process.join()

        def tasks() -> Iterator[Task]:
            for number, task in enumerate(blocks(TEXTS)):
                if number == 6 and moment == "idle":  # by now the first is placed, at least
                    kill()
                yield task

        if moment == "at first":
            kill()
        list(run(lambda text: None, tasks(), checker=checker))
    assert run.text() == "".join(TEXTS)
    deaths = {"never": 0, "asked twice": 2}.get(moment, 1)
    assert run.notes == [f"{KILLED}; another does its work"] * deaths
    assert {text for _, text in run.reference.noted} - {"load"} == set(TEXTS)
    assert not any(here for here, _ in run.reference.noted)
    assert not started()


def test_a_text_that_kills_every_checker_ends_the_run_and_not_this_process(
    tmp_path: Path, started: Started
) -> None:
    run = CheckedRun(tmp_path, Deaths(tmp_path, -1))
    with closing(Checker()) as checker:
        checker.use(run.reference)
        with pytest.raises(PreprocessError, match=f"^{re.escape(KILLED)}, the last of 3 without an answer$"):
            list(run(lambda text: None, blocks(TEXTS), checker=checker))
    assert run.placed <= 3
    assert not any(here for here, _ in run.reference.noted)
    assert not started()


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_library_that_fails_is_told(tmp_path: Path, error: type[Exception]) -> None:
    class Broken(Reference):
        def load(self) -> None:
            raise error("no such thing")

    run = CheckedRun(tmp_path)
    with closing(Checker()) as checker:
        checker.use(Broken(tmp_path / "log"))
        list(run(lambda text: None, blocks(["", ""]), checker=checker))
        while checker.answers:
            checker.receive()
    assert run.notes == [
        "a sample of the ids cannot be checked, as the tokenizer's library fails: "
        f"{error.__name__}: no such thing"
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_is_killed_while_its_chunk_is_checked(tmp_path: Path, started: Started, count: int) -> None:
    """The question is answered nevertheless, and asked again for what another worker makes of the chunk."""
    asked, killed, again = tmp_path / "asked", tmp_path / "killed", tmp_path / "again"

    def act(text: str) -> None:
        if text == TEXTS[2]:
            asked.touch()
            until(again)

    def work(text: str) -> None:
        if text == TEXTS[3]:
            if killed.exists():
                again.touch()
                return
            until(asked)
            killed.touch()
            kill_self()

    run = CheckedRun(tmp_path, act)
    with closing(Checker()) as checker:
        checker.use(run.reference)
        list(run(work, blocks(TEXTS), workers=count, checker=checker))
    assert run.text() == "".join(TEXTS)
    assert len(run.notes) == 1
    assert not any(here for here, _ in run.reference.noted)
    checked = [text for _, text in run.reference.noted]
    assert set(checked) == {"load", *TEXTS}
    assert count > 1 or checked.count(TEXTS[2]) == 2
    assert not started()


@pytest.mark.parametrize("moment", ["never", "enough", "checker", "worker"])
@pytest.mark.parametrize("count", [1, 2])
def test_rare_texts(
    tmp_path: Path, started: Started, monkeypatch: pytest.MonkeyPatch, moment: str, count: int
) -> None:
    """The checker encodes what the fast encoder can't; workers do so when it has died or done enough."""
    if moment == "enough":
        monkeypatch.setattr("megatron_periln.data.preprocess.checker.FOR_ALL_WORKERS", 25)
    pid, killed = tmp_path / "pid", tmp_path / "killed"

    def work(text: str) -> None:
        if text.endswith("5"):
            pid.write_text(str(os.getpid()))

    def act(text: str) -> None:
        if text.endswith("é5") and not killed.exists() and moment in ("checker", "worker"):
            killed.touch()
            os.kill(int(pid.read_text()) if moment == "worker" else os.getpid(), signal.SIGKILL)

    run = CheckedRun(tmp_path, act)
    by_workers = Reference(tmp_path / "by workers")
    pairs = [[f"text {number}", f"é{number}"] for number in range(10)]
    tasks = [Task(Block("file", number, number + 1, to_lines(pair), 1)) for number, pair in enumerate(pairs)]
    with closing(Checker()) as checker:
        checker.use(run.reference)
        list(
            run(
                work,
                tasks,
                workers=count,
                checker=checker,
                guarded=lambda fast: GuardedEncoder(fast, by_workers, [ord("é")]),
            )
        )
    assert run.text() == "".join(text for pair in pairs for text in pair)
    assert len(run.notes) == (moment in ("checker", "worker"))
    assert killed.exists() == (moment in ("checker", "worker"))
    assert bool(by_workers.noted) == (moment in ("checker", "enough"))
    assert not any(here for here, _ in by_workers.noted)
    assert not started()


def test_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CheckedRun(tmp_path)

    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with closing(Checker()) as checker:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fork", refuse)
            checker.use(run.reference)
        list(run(lambda text: None, blocks(TEXTS), checker=checker))
    assert run.text() == "".join(TEXTS)
    assert run.notes == [f"{NOTE}cannot be started: Resource temporarily unavailable; this one does it"]
    assert all(here for here, _ in run.reference.noted)


@pytest.mark.parametrize("dead", [False, True])
def test_a_difference_ends_the_run_before_its_chunk_is_placed(tmp_path: Path, dead: bool) -> None:
    run = CheckedRun(tmp_path, Deaths(tmp_path, int(dead), text="wrong"))
    with closing(Checker()) as checker:
        checker.use(run.reference)
        message = "for 'wrong' at token 0 megatron gives [119, 114, 111, 110], reference [114, 105, 103, 104]"
        with pytest.raises(InexactEncoderError, match=f"^{re.escape(message)}$"):
            list(run(lambda text: None, blocks([*TEXTS[:3], "wrong", *TEXTS[3:]]), checker=checker))
    assert run.placed == 3
    assert len(run.notes) == dead


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """Also while it loads its library, and Ctrl-C is not for it."""
    loading = tmp_path / "loading"

    class Slow(Reference):
        def load(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            loading.touch()
            time.sleep(100)

    def parent() -> None:
        Checker().use(Slow(tmp_path / "log"))
        time.sleep(100)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    until(loading)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.join()
    stat = Path(f"/proc/{child}/stat")
    while stat.exists() and ") Z " not in stat.read_text():
        time.sleep(0.005)


@needs_gigatoken
def test_the_library_is_loaded_beside_the_encoder(
    tmp_path: Path,
    run: Callable,
    started: Started,
    tokenizers: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one process, before the encoder once that is known to be exact; the bytes are the same."""
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "in.jsonl").write_bytes(to_lines([f"some words, number {n}" * 20 for n in range(40)]))
    log = tmp_path / "log"

    def note(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def noted(self: object, *args: object) -> object:
            with log.open("a") as stream:
                stream.write(f"{name}, {len(started())} others, {os.getpid() == home}\n")
            return method(self, *args)

        monkeypatch.setattr(owner, name, noted)

    home, found = os.getpid(), []
    note(TokenizersEncoder, "encode")
    note(GigatokenEncoder, "__init__")
    for name in ("first", "second"):
        log.write_text("")
        flags = ["--output-prefix", tmp_path / name, "--workers", 2, *tokenizers["huggingface"]]
        code, stderr = run("--input", tmp_path / "in.jsonl", "--append-eod", *flags)
        assert code == 0, stderr
        assert ", gigatoken): " in stderr
        found.append(read(tmp_path / f"{name}_text_document"))
        assert not started()
    assert found[0] == found[1]
    first, *others = log.read_text().splitlines()
    assert first == "__init__, 1 others, True"
    assert set(others) == {"encode, 0 others, False"}
