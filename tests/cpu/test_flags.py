"""Megatron's flags under ``--device cpu``."""

import re
import sys
from argparse import Namespace

import pytest

from megatron_periln.cpu.flags import COUNTERPARTS, GPU_ONLY, adapt_arguments

# Argument: what asks for the GPU, as Megatron's parser stores it.
ASKED = {
    "distributed_backend": "nccl",
    "transformer_impl": "transformer_engine",
    "no_persist_layer_norm": False,
    "gradient_accumulation_fusion": True,
    "masked_softmax_fusion": True,
    "apply_rope_fusion": True,
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "cuda_graph_impl": "local",
    "tp_comm_overlap": True,
    "te_rng_tracker": True,
    "deterministic_mode": True,
}


@pytest.fixture(scope="module")
def defaults():
    """Megatron's arguments when none are given."""
    from megatron.training.arguments import parse_args

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain"])
        return parse_args()


def test_every_counterpart_is_tried():
    assert set(ASKED) == {name for name, _, _ in COUNTERPARTS}


@pytest.mark.parametrize("name, value, reason", COUNTERPARTS)
def test_counterpart_is_set_and_reported_in_words(name, value, reason):
    args = Namespace(**{name: ASKED[name]})
    (change,) = adapt_arguments(args)
    assert getattr(args, name) == value
    assert change == f"{name} {ASKED[name]} -> {value} ({reason})"


def test_nothing_is_reported_when_all_is_right():
    right = {name: value for name, value, _ in COUNTERPARTS}
    args = Namespace(**right, fp8=None, use_torch_fsdp2=False)
    assert adapt_arguments(args) == []
    assert adapt_arguments(Namespace()) == []
    assert vars(args) == {**right, "fp8": None, "use_torch_fsdp2": False}


@pytest.mark.parametrize("name", ASKED)
def test_megatron_has_the_argument(defaults, name):
    assert hasattr(defaults, name)


@pytest.mark.parametrize("rule", GPU_ONLY)
def test_what_needs_a_gpu_is_refused_with_advice(monkeypatch, defaults, rule):
    """And as the advice says, nothing is wrong any more."""
    from megatron.training.arguments import parse_args

    flag = rule.text.split()[0]
    values = {
        "--fp8-format": ["hybrid"],
        "--fp4-format": ["e2m1"],
        "--moe-latent-size": ["32"],
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
    sorted({flag for rule in GPU_ONLY for flag in re.findall(r"--[\w-]+", rule.text.partition("; ")[2])}),
)
def test_advised_flag_exists(monkeypatch, flag):
    from megatron.training.arguments import parse_args

    monkeypatch.setattr(sys, "argv", ["pretrain", flag])
    parse_args()


def test_the_defaults_of_megatron_become_right(defaults):
    changed = {line.split()[0] for line in adapt_arguments(defaults)}
    assert {"distributed_backend", "transformer_impl", "gradient_accumulation_fusion"} <= changed
    assert adapt_arguments(defaults) == []


def test_asynchronous_saves_end():
    """Under nvidia-resiliency-ext's writer, Megatron's default, they never do here."""
    args = Namespace(async_save=True, async_strategy="nvrx")
    (change,) = adapt_arguments(args)
    assert change.startswith("async_strategy nvrx -> mcore")
    assert args.async_strategy == "mcore"
    assert adapt_arguments(args) == []
    assert adapt_arguments(Namespace(async_save=False, async_strategy="nvrx")) == []
