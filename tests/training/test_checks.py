"""What Megatron would end with a traceback, with flags that a job of the other tests can't leave out."""

import argparse
import json
import sys

import pytest
import torch
from megatron.training.arguments import parse_args
from torch.distributed.run import get_args_parser

from megatron_periln.errors import RankError, UsageError
from megatron_periln.megatron_arguments import megatron_arguments
from megatron_periln.norms import kernels
from megatron_periln.rules import refuse
from megatron_periln.training import norm_backend
from megatron_periln.training.checks import AS_PARSED, MODEL, SIZES
from megatron_periln.training.parsing import add_arguments

ENOUGH = "--eval-interval 100 --save checkpoints --save-interval 10"


@pytest.fixture
def check(monkeypatch):
    """Check flags as a rank of torchrun's."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")

    def run(flags):
        monkeypatch.setattr(sys, "argv", ["pretrain", *flags.split()])
        refuse(parse_args(add_arguments), (*SIZES, *AS_PARSED))

    return run


def test_enough_is_enough(check):
    check(ENOUGH)
    check(f"{ENOUGH} --fp8-format hybrid --fp8-param-gather")


def test_what_goes_with_fp8_is_one_message_without(check, monkeypatch):
    """As on a GPU: the CPU has neither, and says so."""
    monkeypatch.setattr("megatron_periln.cpu.is_active", lambda: False)
    with pytest.raises(UsageError, match="3 things are wrong") as refusal:
        check(
            f"{ENOUGH} --fp8-param-gather --moe-router-padding-for-quantization "
            "--reuse-grad-buf-for-mxfp8-param-ag --fp8-recipe blockwise"
        )
    for flag in ("--fp8-param-gather", "--moe-router-padding-for-quantization"):
        assert f"  {flag} needs --fp8-format; give it too, or drop {flag}" in str(refusal.value)


def test_an_interval_is_missing(check):
    with pytest.raises(UsageError, match="--save needs --save-interval"):
        check("--eval-interval 100 --save checkpoints")


@pytest.mark.parametrize("flag", ["--micro-batch-size", "--global-batch-size", "--eval-micro-batch-size"])
def test_a_batch_size_is_positive(check, flag):
    with pytest.raises(UsageError, match=f"{flag} must be positive, not 0"):
        check(f"{ENOUGH} {flag} 0")


LAYERS = "--heterogeneous-layers-config"
LOCAL = "--transformer-impl local"
WHOLE = "--qk-layernorm --whole-qk-norm --normalization RMSNorm"
EXPERTS = f"{LOCAL} --num-experts 4 --moe-router-topk 1"
BUILT = {
    f"{LAYERS}-path absent.json": "absent.json: cannot be read: No such",
    f"{LAYERS}-path no.json": "no.json: not JSON with block_configs",
    f"{LAYERS}-path list.json": "list.json: not JSON with block_configs",
    f"{LAYERS}-path few.json": "1 block_configs for --num-layers 2; give one a layer",
    f"{LAYERS}-encoded-json {{": "-encoded-json: not JSON with block_configs",
    "--te-precision-config-file absent.yaml": "absent.yaml: cannot be read: No such",
    "--te-precision-config-file no.yaml": "not such a file .*ParserError",
    "--te-precision-config-file list.json": "not such a file .*AttributeError",
    f"{LOCAL} --use-te-activation-func": "needs Transformer Engine's layers .*; drop it",
    f"{EXPERTS} --swiglu": "local experts on one rank .* can't add biases; give --disable-bias-linear",
    f"{EXPERTS} --swiglu --expert-model-parallel-size 2": "or --no-bias-swiglu-fusion",
    f"{EXPERTS} --expert-model-parallel-size 2": "give --no-bias-gelu-fusion",
    "--multi-latent-attention --rope-type rope": "is of YaRN alone; give --no-rope-fusion too",
    f"{WHOLE} --hybrid-override-pattern *-*-": "neither latent nor of a hybrid model",
    f"{WHOLE} {LAYERS}-path two.json": "neither .* or layers that differ; drop it",
    f"{WHOLE} --group-query-attention --num-query-groups 1 --tensor-model-parallel-size 2": (
        "at least as many --num-query-groups as --tensor-model-parallel-size"
    ),
}
FITTING = [
    f"{EXPERTS} --swiglu --disable-bias-linear",
    f"{EXPERTS} --swiglu --expert-model-parallel-size 2 --no-bias-swiglu-fusion",
    f"{EXPERTS} --quick-geglu --expert-model-parallel-size 2",
    "--num-experts 4 --swiglu --moe-router-topk 1 --moe-grouped-gemm",
    f"{LAYERS}-path two.json --te-precision-config-file recipe.yaml",
    f"{WHOLE} --num-attention-heads 4 --tensor-model-parallel-size 2",
    "--multi-latent-attention --rope-type rope --no-rope-fusion",
    "--multi-latent-attention",
]


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Check a model's flags, in a folder with files that they name."""
    monkeypatch.chdir(tmp_path)
    contents = {"no.json": "{", "list.json": "[1]", "few.json": {"block_configs": [{}]}, "no.yaml": "a: ["}
    contents |= {"two.json": {"block_configs": [{}, {}]}, "recipe.yaml": "{configs: {}, matchers: {}}"}
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)

    def run(flags):
        given = f"{ENOUGH} --num-layers 2 --norm-placement pre {flags}".split()
        refuse(megatron_arguments(given, add_arguments), MODEL)

    return run


@pytest.mark.parametrize("flags", FITTING)
def test_what_can_be_built_is_left_alone(build, flags):
    build(flags)


@pytest.mark.parametrize(("flags", "error"), BUILT.items(), ids=BUILT)
def test_what_can_not_be_built_is_one_line(build, flags, error):
    with pytest.raises(UsageError, match=error) as caught:
        build(flags)
    assert "\n" not in str(caught.value)


def test_a_launcher_is_missing(check, monkeypatch):
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UsageError, match="MASTER_PORT not set: start with torchrun"):
        check(ENOUGH)


def short_forms_for_torchrun(flags):
    """Return the flags that Python before 3.13 makes torchrun refuse, wherever they stand."""
    theirs = get_args_parser()._option_string_actions
    return [
        flag for flag in flags if flag not in theirs and any(option.startswith(flag) for option in theirs)
    ]


def test_torchrun_takes_no_flag_of_ours_for_its_own():
    parser = add_arguments(argparse.ArgumentParser())
    own = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    assert "--monitor-layers" in own
    assert short_forms_for_torchrun(own) == []
    assert short_forms_for_torchrun(["--monitor"]) == ["--monitor"]


@pytest.mark.parametrize(
    ("placement", "rule", "words"),
    [
        ("gated-peri", None, "in the Triton kernels"),
        ("peri", '{"output": "mlp", "learned": "scales"}', "in the Triton kernels where output norms stand"),
        ("post", '{"learned": "scales"}', "not in the Triton kernels, which are those of output norms"),
        ("gpas", None, "not in the Triton kernels, as gpas acts on the sum"),
    ],
)
def test_who_computes_learned_scales_is_said(placement, rule, words, monkeypatch, capsys):
    tested = []
    monkeypatch.setattr(norm_backend, "find_failure", lambda *_, **options: tested.append(options))
    model = {"hidden_size": 64, "params_dtype": torch.float32, "normalization": "RMSNorm", "norm_rule": rule}
    off = dict.fromkeys(
        ["fp32_residual_connection", "layernorm_zero_centered_gamma", "fuse_pre_mlp_norm"], False
    )
    args = argparse.Namespace(norm_backend="triton", norm_placement=placement, rank=0, **model, **off)
    try:
        norm_backend.choose_norm_backend(args)
    finally:
        kernels.use_backend("auto")
    assert f"learned scales: {words}\n" in capsys.readouterr().out
    learned = "gates" if placement == "gated-peri" else "scales"
    assert [options["learned"] for options in tested] == [learned] * ("peri" in placement)


def test_kernels_that_are_off_on_a_rank_are_refused(monkeypatch):
    monkeypatch.setattr(
        norm_backend, "find_failure", lambda *_, **__: "fails here: RuntimeError: no such thing"
    )
    model = {"hidden_size": 64, "params_dtype": torch.float32, "normalization": "RMSNorm"}
    off = dict.fromkeys(
        ["fp32_residual_connection", "layernorm_zero_centered_gamma", "fuse_pre_mlp_norm"], False
    )
    args = argparse.Namespace(norm_backend="triton", norm_placement="peri", rank=3, **model, **off)
    try:
        with pytest.raises(RankError, match=r"^rank 3, .* no such thing; give --norm-backend compile"):
            norm_backend.choose_norm_backend(args)
        args.norm_placement = "pre"
        norm_backend.choose_norm_backend(args)
    finally:
        kernels.use_backend("auto")
