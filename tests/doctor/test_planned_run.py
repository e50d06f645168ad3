"""The row of the run's plan: which command is run, and what is told of what it said."""

import json
import subprocess

import pytest

from megatron_periln.doctor import options, planned_run
from megatron_periln.doctor.rows import Row

FITS = {
    "ranks": [{"name": "first stage", "bytes": 60 << 30}, {"name": "last stage", "bytes": 50 << 30}],
    "gpu": {"name": "h100-80", "memory": 79 << 30},
}
LINE = [
    "--plan",
    "h100-80",
    "--world-size=64",
    "--timeout",
    "5",
    "--all-reduce",
    "--num-layers",
    "4",
    "--save",
    "x",
]


@pytest.fixture
def row(monkeypatch):
    commands = []

    def check(status=0, stdout="", stderr="", line=LINE):
        def run(command, seconds):
            if status is None:
                raise subprocess.TimeoutExpired(command, seconds)
            commands.append(command)
            return subprocess.CompletedProcess(command, status, stdout, stderr)

        monkeypatch.setattr(planned_run, "run_within", run)
        (found,) = planned_run.check_plan(options.parse(line))
        return found

    check.commands = commands
    return check


def test_a_run_that_fits(row):
    assert row(stdout=json.dumps(FITS)) == Row(
        "plan", "ok", "first stage needs 60.0 GiB of h100-80's 79.0 GiB"
    )
    (command,) = row.commands
    assert command[4:] == [
        "megatron_periln.plan", "--world-size", "64", "--gpu", "h100-80", "--json",
        "--num-layers", "4", "--save", "x",
    ]  # fmt: skip


def test_one_that_does_not(row):
    said = "noise\nerror: the run does not fit: first stage needs 90.0 GiB; give --micro-batch-size 1\n"
    found = row(1, json.dumps(FITS), said)
    assert found.status == "failed" and found.value.endswith("needs 90.0 GiB")
    assert found.advice == "give --micro-batch-size 1"


def test_no_answer_and_no_size(row):
    assert "no end in 5 s" in row(None).value
    assert "--world-size" in row(line=["--plan", "h100-80", "--num-layers", "4"]).advice
    assert row(-9).value == "exit status -9"
