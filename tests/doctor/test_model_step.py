"""The step of two layers: what the flags become, and what is told of it."""

import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_periln.doctor import model_step
from megatron_periln.doctor.model_step import check_model_step, describes_a_model
from megatron_periln.doctor.two_layers import shortened
from megatron_periln.megatron_arguments import megatron_arguments
from megatron_periln.training.parsing import add_arguments
from tests.doctor.conftest import FOUND

ROOT = Path(__file__).parents[2]


def short(flags):
    parsers = []

    def add(parser):
        parsers.append(add_arguments(parser))
        return parser

    words = flags.split()
    args = megatron_arguments(words, add, ignore_unknown=True)
    out = shortened(words, parsers[0], args)
    megatron_arguments(out, add_arguments)  # which takes them all
    return " ".join(out)


def test_what_says_how_the_model_computes_stays():
    flags = (
        "--norm-placement output --hidden-size 64 --num-attention-heads 4 --swiglu --bf16 --no-rope-fusion "
        "--fp8-format hybrid --optimizer muon --overlap-grad-reduce --use-distributed-optimizer "
        "--recompute-granularity full --fp32-residual-connection --seq-length 32"
    )
    assert short(f"--num-layers 24 {flags}").startswith(f"--num-layers 24 {flags} --num-layers 2 ")


def test_where_and_how_long_do_not():
    out = short(
        "--num-layers 24 --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4 "
        "--context-parallel-size=2 --save ckpt --load ckpt --data-path 0.5 a 0.5 b --train-samples 9 "
        "--global-batch-size 1024 --lr-warmup-samples 3 --tensorboard-dir tb --json --timeout 9 --unknown 1 "
        "--tokenizer-type GPT2BPETokenizer --monitor-layers all --num-workers 8"
    )
    gone = "parallel save load data-path samples 1024 tensorboard json timeout unknown GPT2 monitor 8"
    assert [word for word in gone.split() if word in out] == []
    assert out.endswith("--mock-data --tokenizer-type NullTokenizer --vocab-size 31999")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--num-layers 61 --num-experts 256 --moe-layer-freq ([0]*3+[1]*58)",
            "--moe-layer-freq ([0]*1+[1]*1)",
        ),
        ("--num-layers 8 --num-experts 64 --expert-model-parallel-size 8", "--num-experts 8"),
        (
            "--num-layers 8 --num-experts 64 --expert-model-parallel-size 64 --moe-router-topk 6",
            "--num-experts 64",
        ),
        ("--hybrid-layer-pattern M*-M-|M*E-/*-/*-", "--hybrid-layer-pattern M*-E/*-"),
        ("--num-layers 8 --cuda-graph-impl local --cuda-graph-warmup-steps 3", "--train-iters 5"),
        ("--num-layers 8 --recompute-num-layers 4", "--recompute-num-layers 1"),
        ("--num-layers 8 --device cpu --seq-length 4096", "--seq-length 128"),
        ("--num-layers 8 --padded-vocab-size 1024", "--vocab-size 1023"),
    ],
)
def test_what_goes_by_layer_has_one_of_each(flags, expected):
    words = short(flags).split()
    flag, value = expected.split()
    assert words[len(words) - 1 - words[::-1].index(flag) + 1] == value


def test_a_step_on_the_cpu():
    options = parse(
        f"--device cpu @{ROOT}/examples/quickstart/model.flags --monitor-layers all --seq-length 64"
    )
    (row,) = check_model_step(options, {})
    assert row.status == "ok" and row.value.startswith("a step on the CPU, loss 10."), row


def parse(flags):
    from megatron_periln.doctor import options

    return options.parse(flags.split())


def test_what_pretraining_refuses_is_its_row(doctor, monkeypatch):
    said = "W1128 warning\nerror: --hidden-size (30) must be divisible; change one of them\n"
    ends = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(model_step, "run_within", lambda *_, **__: ends)
    code, rows, lines = doctor("--device", "cpu", "--num-layers", 2)
    assert code == 1
    told = "--hidden-size (30) must be divisible; change one of them"
    assert rows[model_step.CHECK] == [("failed", told)]
    assert [line.endswith(told) for line in lines if model_step.CHECK in line] == [True]


def test_without_a_model_there_is_no_row(doctor):
    assert not describes_a_model(Namespace(flags=["--bf16"]))
    assert model_step.CHECK not in doctor("--device", "cpu")[1]


@pytest.fixture
def gpus(monkeypatch):
    """Let each GPU's process end as is given for it; collect their environments."""
    environments = {}

    def install(*ends):
        def run_within(command, seconds, env):
            index = int(env["CUDA_VISIBLE_DEVICES"])
            environments[index] = env
            code, out, err = ends[index]
            return subprocess.CompletedProcess(command, code, out, err)

        monkeypatch.setattr(model_step, "run_within", run_within)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        answers = {**FOUND, "CUDA": {"version": "13", "gpus": len(ends)}}
        options = Namespace(device="cuda", flags=["--num-layers", "2"], timeout=9)
        return [(row.status, row.value) for row in check_model_step(options, answers)], environments

    return install


WELL = (0, " iteration 1/ 1 | lm loss: 1.0981234E+01 | loss scale: 1.0 |", "")


def test_all_gpus_are_well(gpus):
    rows, environments = gpus(WELL, WELL)
    assert rows == [("ok", "a step on 2 GPUs, loss 10.981")]
    assert environments[0]["MASTER_PORT"] and environments[1]["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("end", "row"),
    [
        ((1, "", "x\nerror: cuDNN is old; raise it\nTraceback"), ("failed", "GPU 1: cuDNN is old; raise it")),
        (
            (1, "", "Traceback\n  at\nRuntimeError: no kernel\nW1128 after"),
            ("failed", "GPU 1: RuntimeError: no kernel"),
        ),
        ((-11, "", ""), ("failed", "GPU 1: SIGSEGV")),
        ((1, "", "torch.OutOfMemoryError: CUDA"), ("warning", "GPU 1: two layers don't fit one GPU")),
        ((0, "no loss", ""), ("failed", "GPU 1: exit status 0")),
    ],
    ids=str,
)
def test_one_gpu_is_not(gpus, end, row):
    assert gpus(WELL, end)[0] == [row]


def test_a_step_that_hangs(monkeypatch):
    def hangs(command, seconds, env):
        raise subprocess.TimeoutExpired(command, seconds)

    monkeypatch.setattr(model_step, "run_within", hangs)
    options = Namespace(device="cpu", flags=["--num-layers", "2"], timeout=9)
    assert [row.value for row in check_model_step(options, {})] == ["no end in 9 s"]
