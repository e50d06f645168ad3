"""A call in a process of its own: its result, its error, its death."""

from __future__ import annotations

import json
import os
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_periln.data.tokenizer_training.child import in_child
from megatron_periln.data.tokenizer_training.train import train_huggingface
from megatron_periln.errors import PreprocessError
from tests.data.companions import (
    TOOLS,
)
from tests.data.training_runs import KINDS

TOOL = TOOLS / "train_tokenizer.py"


def test_result_and_error() -> None:
    assert in_child(os.getpid) != os.getpid()
    assert in_child(int, "12", base=3) == 5
    assert in_child(os.getpgrp) != os.getpgrp()  # so that Ctrl-C is this process's to handle
    with pytest.raises(PreprocessError, match="--vocab-size 1: at least 258"):
        in_child(train_huggingface, [], vocab_size=1)


def test_what_it_prints_is_not_its_result(capfd: pytest.CaptureFixture[str]) -> None:
    assert in_child(print, "text", flush=True) is None
    assert capfd.readouterr() == ("", "text\n")


def test_killed() -> None:
    with pytest.raises(PreprocessError, match="ended with signal 9: most likely the memory"):
        in_child(signal.raise_signal, signal.SIGKILL)
    with pytest.raises(PreprocessError, match="ended with exit code 3"):
        in_child(os._exit, 3)


def test_an_interrupt_ends_it_at_once() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            in_child(time.sleep, 30)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert time.monotonic() - started < 10


def test_interrupt(tmp_path: Path) -> None:
    """While SentencePiece trains, which knows no Ctrl-C."""
    large = tmp_path / "large.jsonl"
    letters, draw = string.ascii_lowercase, random.Random(1)
    words = ["".join(draw.choices(letters, k=8)) for _ in range(400_000)]
    lines = (json.dumps({"text": " ".join(words[n : n + 500])}) for n in range(0, len(words), 500))
    large.write_text("\n".join(lines))
    flags = [*KINDS["unigram"], "--vocab-size", "8000", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "--input", str(large), *flags],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore SIGINT, and so would the processes that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr
    assert process.stderr.readline().startswith("Training on ")
    time.sleep(0.3)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert (process.returncode, stderr) == (130, "interrupted: nothing was written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.jsonl"]
