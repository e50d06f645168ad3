"""The whole command: Megatron's real model, small, on 64 GPUs that aren't there."""

import json
import shlex

import pytest

from megatron_periln.plan.__main__ import main

MODEL = """--num-layers 4 --hidden-size 128 --ffn-hidden-size 512 --num-attention-heads 4
    --seq-length 256 --max-position-embeddings 256 --micro-batch-size 2 --global-batch-size 64
    --bf16 --train-iters 100 --lr 1e-3
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --mock-data --tokenizer-type NullTokenizer --vocab-size 1023
    --use-distributed-optimizer --tensor-model-parallel-size 2 --sequence-parallel
    --pipeline-model-parallel-size 2 --hidden-dropout 0 --attention-dropout 0 --world-size 64"""


@pytest.fixture
def plan(capsys):
    def run(more=""):
        status = main(shlex.split(f"{MODEL} {more}"))
        return status, *capsys.readouterr()

    return run


def test_placements_compared(plan):
    """Peri-LN keeps each sublayer's output for its norm: two more tensors a layer, of the rank's tokens."""
    status, out, err = plan("--compare pre peri --json")
    assert (status, err) == (0, "")
    pre, peri = (each["ranks"][1] for each in json.loads(out)["plans"])
    assert peri["name"] == "last stage" and peri["ranks_alike"] == 32
    tensors, rows = 2 * 2 * 128 * 2 * 128 * 2, 2 * 2 * 128 * 2 * 4  # two layers; fp32 statistics of each row
    assert peri["memory"]["activations"] - pre["memory"]["activations"] == tensors + rows
    assert {each["group"] for each in peri["sent"]} == {"TP", "PP", "DP"}


def test_changes_for_a_gpu_that_is_too_small(plan):
    """Planned for real; what takes the allowances alone can't be made to fit."""
    status, out, err = plan("--gpu 1 --no-changes")
    assert status == 1 and "DOES NOT FIT" in out and err.startswith("error: the run does not fit: ")


@pytest.mark.parametrize("more, said", [("--world-size 63", "63"), ("--tensor-model-parallel-size 3", "3")])
def test_a_layout_that_megatron_refuses_is_one_line(plan, more, said):
    status, out, err = plan(more)
    assert (status, out) == (1, "") and err.startswith("error: ") and "divisible" in err and said in err
