"""Records of runs whose first iterations Megatron skips: they begin where training does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_periln.monitor.reading import read_run
from megatron_periln.monitor.record import RunRecord
from tests.monitor.records import HEADER, iterations, write
from tests.training.model import MODEL

ROOT = Path(__file__).parents[2]

FLAGS = f"""--device cpu --norm-placement peri --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2
    --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 1 --lr 1e-3
    --mock-data --tokenizer-type NullTokenizer --vocab-size 64 --eval-iters 0 --eval-interval 100
    --num-workers 0 --monitor-layers all {MODEL} --save-interval 3"""


@pytest.fixture
def train(tmp_path):
    def run(*arguments):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("-m", "megatron_periln.pretrain", *FLAGS.split()),
                *("--save", tmp_path, *arguments),
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def test_a_new_run_keeps_the_earlier_one_aside_and_a_resumed_one_drops_what_it_skips(train, tmp_path):
    path = tmp_path / "monitor.jsonl"
    write(RunRecord.open(path, HEADER, 0), 1, 4)
    train("--iterations-to-skip", "1", "2")
    assert iterations(tmp_path / "monitor.1.jsonl") == [1, 2, 3, 4]
    assert (iterations(path, "run"), iterations(path)) == ([0], [3, 4, 5, 6])
    train("--iterations-to-skip", "4", "5", "--load", str(tmp_path), "--ckpt-step", "3")
    assert (read_run(path).resumed_from, iterations(path)) == ([3], [3, 6])
