"""Megatron's flags under ``--device cpu``."""

import re
import sys
from argparse import ArgumentParser, Namespace

import pytest

from megatron_periln.cpu.flags import (
    COUNTERPARTS,
    GPU_ONLY,
    LOW_PRECISION,
    REPLACED,
    adapt_arguments,
    without_low_precision,
)
from megatron_periln.rules import Rule

# As Megatron's parser stores it, for arguments on the CPU of the same kind.
ASKED = {False: True, True: False, None: "given", "fp32": "bf16"}
ASKED_WORDS = {
    "distributed_backend": "nccl",
    "transformer_impl": "transformer_engine",
    "cuda_graph_impl": "local",
    "moe_flex_dispatcher_backend": "hybridep",
}
RULES = [rule for rule in GPU_ONLY if isinstance(rule, Rule)]


@pytest.fixture(scope="module")
def defaults():
    """Megatron's arguments when none are given."""
    from megatron.training.arguments import parse_args

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain"])
        return parse_args()


@pytest.mark.parametrize("name, value, reason", COUNTERPARTS)
def test_counterpart_is_set_and_reported_in_words(name, value, reason):
    asked = ["given"] if value == [] else ASKED_WORDS.get(name) or ASKED[value]
    args = Namespace(**{name: asked})
    *_, change = adapt_arguments(args)
    assert getattr(args, name) == value
    assert change == f"{name} {'given' if value == [] else asked} -> {value} ({reason})"


@pytest.mark.parametrize("name, values, value, reason", REPLACED)
def test_only_what_needs_a_gpu_is_replaced(defaults, name, values, value, reason):
    assert getattr(defaults, name) not in values
    for asked in values:
        args = Namespace(**{name: asked})
        assert adapt_arguments(args) == [f"{name} {asked} -> {value} ({reason})"]
        assert getattr(args, name) == value
    assert adapt_arguments(Namespace(**{name: "other"})) == []


@pytest.mark.parametrize("name, without", [(name, value) for name, (_, value) in LOW_PRECISION.items()])
def test_what_goes_with_fp8_has_the_default_of_megatron_without_it(defaults, name, without):
    assert getattr(defaults, name) == without


def test_fp8_and_what_goes_with_it_is_one_refusal():
    given = {"fp8": "hybrid", "fp8_recipe": "blockwise", "fp8_param_gather": True}
    args = Namespace(**given, bf16=False, fp16=False)
    texts = [text for rule in GPU_ONLY for text in rule(args)]
    assert texts == [
        "--fp8-format, --fp8-param-gather, --fp8-recipe: FP8 and FP4 need a GPU and have no counterpart "
        "under --device cpu; drop them, or give --without-fp8 to train in bf16"
    ]
    assert [text for rule in GPU_ONLY for text in rule(Namespace(fp8_recipe="blockwise"))] == []
    args = Namespace(**given, bf16=False, fp16=False)
    assert without_low_precision(args) == [
        "--without-fp8: trains in bf16, without --fp8-format, --fp8-param-gather, --fp8-recipe"
    ]
    assert args == Namespace(fp8=None, fp8_recipe="delayed", fp8_param_gather=False, bf16=True, fp16=False)
    assert without_low_precision(args) == []


def test_hybrid_layers_that_need_a_gpu_are_named():
    def texts(pattern):
        return [text for rule in GPU_ONLY for text in rule(Namespace(hybrid_layer_pattern=pattern))]

    (text,) = texts("M-D*")
    assert "layers D need a GPU" in text
    assert texts("*-+E|*-MG") == []


def test_nothing_is_reported_when_all_is_right():
    right = {name: value for name, value, _ in COUNTERPARTS}
    args = Namespace(**right, fp8=None)
    assert adapt_arguments(args) == []
    assert adapt_arguments(Namespace()) == []
    assert vars(args) == {**right, "fp8": None}


@pytest.mark.parametrize("name", [name for name, *_ in (*COUNTERPARTS, *REPLACED)])
def test_megatron_has_the_argument(defaults, name):
    assert hasattr(defaults, name)


@pytest.mark.parametrize("rule", RULES)
def test_what_needs_a_gpu_is_refused_with_advice(monkeypatch, defaults, rule):
    """And as the advice says, nothing is wrong any more."""
    from megatron.training.arguments import parse_args

    flag = rule.text.split()[0]
    values = {
        "--moe-latent-size": ["32"],
        "--moe-expert-rank-capacity-factor": ["1.5"],
        "--moe-mlp-glu-interleave-size": ["8"],
        "--moe-shared-expert-glu-interleave-size": ["8"],
        "--experimental-attention-variant": ["gated_delta_net"],
    }
    value = values.get(flag, [])
    monkeypatch.setattr(sys, "argv", ["pretrain", flag, *value])
    args = parse_args()
    assert list(rule(defaults)) == []
    (text,) = rule(args)
    assert text.startswith(f"{flag} needs a GPU and has no counterpart under --device cpu; ")
    assert list(rule(args)) == []
    assert all(getattr(args, name) == getattr(defaults, name) for name in rule.instead)


@pytest.mark.parametrize(
    "flag",
    sorted({flag for rule in RULES for flag in re.findall(r"--[\w-]+", rule.text.partition("; ")[2])}),
)
def test_advised_flag_exists(flag):
    from megatron.training.arguments import add_megatron_arguments

    assert flag in add_megatron_arguments(ArgumentParser())._option_string_actions


def test_the_defaults_of_megatron_become_right(defaults):
    changed = {line.split()[0] for line in adapt_arguments(defaults)}
    assert {"distributed_backend", "transformer_impl", "gradient_accumulation_fusion"} <= changed
    assert adapt_arguments(defaults) == []


def test_asynchronous_saves_end():
    """Under nvidia-resiliency-ext's writer, Megatron's default, they never do here."""
    args = Namespace(async_save=True, use_persistent_ckpt_worker=True, async_strategy="nvrx")
    (change,) = adapt_arguments(args)
    assert change.startswith("async_strategy nvrx -> mcore")
    assert args.async_strategy == "mcore"
    assert adapt_arguments(args) == []
    assert adapt_arguments(Namespace(async_save=False, async_strategy="nvrx")) == []
    args.async_strategy, args.use_persistent_ckpt_worker = "nvrx", False
    assert adapt_arguments(args) == []
