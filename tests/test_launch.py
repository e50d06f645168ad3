"""What a job says of an error is one line, on one rank, whichever rank is the first to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_periln import launch

ROOT = Path(__file__).parents[1]


# What Python does at its end, and `end_at_once` leaves out.
TELLS_ITS_END = """import os, sys
class Tells:
    def __del__(self, write=os.write):
        write(2, b"was taken apart\\n")
sys.tells = Tells()
"""
ONE_STEP = """--device cpu --mock-data --tokenizer-type NullTokenizer --vocab-size 128 --norm-placement peri
--num-layers 1 --hidden-size 16 --num-attention-heads 1 --seq-length 16 --max-position-embeddings 16
--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3 --eval-iters 0"""


def run(*words, first=""):
    path = f"{first}{os.pathsep}{ROOT}" if first else str(ROOT)
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_periln.launch", "--standalone", "--max-restarts", "0", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_an_error_of_two_ranks_is_one_line():
    job = run("--nproc-per-node", "2", "-m", "megatron_periln.pretrain", "@absent.flags")
    assert job.returncode == 1
    assert "Traceback" not in job.stderr
    (line,) = [line for line in job.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: flag file absent.flags: No such file or directory")


def test_a_job_that_is_done_ends_at_once(tmp_path):
    """Its rank and its launcher: each would tell, as the ranks of another program and their launcher do."""
    (tmp_path / "sitecustomize.py").write_text(TELLS_ITS_END)
    words = ("--nproc-per-node", "1", "-m", "megatron_periln.pretrain", *ONE_STEP.split())
    done = run(*words, first=tmp_path)
    assert (done.returncode, "was taken apart" in done.stderr) == (0, False), done.stderr
    other = run("--nproc-per-node", "1", "-m", "this", first=tmp_path)
    assert (other.returncode, other.stderr.count("was taken apart")) == (0, 2), other.stderr


def test_a_rank_that_could_say_nothing_is_named(tmp_path):
    killed = tmp_path / "killed.sh"
    killed.write_text("kill -9 $$\n")
    job = run("--nproc-per-node", "1", "--no-python", "sh", str(killed))
    assert job.returncode == 1
    assert "Traceback" not in job.stderr
    assert job.stderr.splitlines()[-1].startswith("error: rank 0 (local rank 0, process ")
    assert "ended with SIGKILL" in job.stderr


def test_a_rank_that_is_not_to_speak_leaves_time_to_the_one_that_is(tmp_path):
    """torchrun ends that one as soon as a rank has ended: its line was lost if another was faster."""
    file = tmp_path / "error.json"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RANK": "1",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_ERROR_FILE": str(file),
    }
    command = [sys.executable, "-m", "megatron_periln.pretrain", "@absent.flags"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as rank:
        while not file.exists() and rank.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        rank.send_signal(signal.SIGTERM)
        assert (rank.wait(), rank.stderr.read()) == (1, "")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--device cpu", True),
        ("--lr 1 --device=cpu", True),
        ("@cpu.flags", True),
        ("--device cuda", False),
        ("@cpu.flags --device cuda", False),  # the last one counts
        ("--lr 1", False),
        ("--device", False),
        ("@absent.flags --device cpu", False),  # which the ranks say
    ],
)
def test_only_ranks_on_the_cpu_are_forked(monkeypatch, tmp_path, flags, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu.flags").write_text("--lr 1 --device cpu  # no GPU\n")
    forked = []
    monkeypatch.setattr(launch, "fork_ranks", lambda number, module: [number])
    monkeypatch.setattr(launch, "start_as_ranks", lambda ranks, module: forked.extend(ranks))
    monkeypatch.setattr(sys, "argv", ["launch", "-m", "megatron_periln.pretrain", *flags.split()])
    launch._fork_first()
    assert forked == ([1] if expected else [])
