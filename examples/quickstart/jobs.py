"""Commands of the quickstart, and what the log of a training job tells while it runs."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) .*lm loss: ([\dE.+-]+)")
_VALIDATION = re.compile(
    r"validation loss at iteration (\d+) (?:on validation set )?\| lm loss value: ([\dE.+-]+)"
)


def say(text: str) -> None:
    """Print a step of the tour."""
    print(f"\n>> {text}", flush=True)


def run(command: list[str], log: Path) -> None:
    """Run a command with its output in ``log``; exit with its last lines if it fails."""
    for _ in _follow(command, log):
        pass


@dataclass
class Progress:
    """What the log of a training job has told so far."""

    validation: float = math.nan

    def read(self, line: str) -> str | None:
        """Take in a line of the log; return what is worth showing of it."""
        if match := _VALIDATION.search(line):
            self.validation = float(match[2])
            return f"   validation loss after {match[1]} iterations: {self.validation:.3f}"
        if match := _ITERATION.search(line):
            bar = "#" * round(30 * int(match[1]) / int(match[2]))
            return f"   [{bar:<30}] {match[1]}/{match[2]}  loss {float(match[3]):.3f}"
        return None


def train(arguments: list[str], ranks: int, log: Path, progress: Progress) -> None:
    """Run one training job, showing its progress, on one line in a terminal."""
    launch = [sys.executable, "-m", "megatron_periln.launch", "--nproc-per-node", str(ranks)]
    command = [*launch, "-m", "megatron_periln.pretrain", *arguments]
    inline = sys.stdout.isatty()
    for line in _follow(command, log):
        if shown := progress.read(line):
            print(shown, end="\r" if inline and "[" in shown else "\n", flush=True)
    if inline:
        print()


def _follow(command: list[str], log: Path) -> Iterator[str]:
    """Run a command; append its output to ``log`` and yield its lines. Exit if it fails."""
    print("   $ " + shlex.join(command), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with (
        log.open("a") as output,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            output.write(line)
            output.flush()
            yield line
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        sys.exit(f"{tail}\n\n{shlex.join(command[:4])} ... failed; the whole log is {log}")
