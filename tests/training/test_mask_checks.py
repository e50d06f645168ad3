"""Masks that attention would not have as the flags say are refused."""

import sys

import pytest
from megatron.training.arguments import parse_args

from megatron_periln.errors import UsageError
from megatron_periln.rules import refuse
from megatron_periln.training.mask_checks import MASKS
from megatron_periln.training.parsing import add_arguments

LOCAL = "--transformer-impl local"


def check(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["pretrain", "--num-layers", "4", *flags.split()])
    refuse(parse_args(add_arguments), MASKS)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--reset-attention-mask", "no effect on Transformer Engine's causal attention"),
        (f"--reset-attention-mask {LOCAL} --bf16", "no effect on the fused softmax"),
        (f"--reset-attention-mask {LOCAL} --no-create-attention-mask-in-dataloader", "drop one of them"),
        (
            "--reset-attention-mask --hybrid-layer-pattern M*-G",
            "layers of G and M read no mask",
        ),
        (
            f"--reset-attention-mask {LOCAL} --experimental-attention-variant gated_delta_net",
            "layers of gated_delta_net read no mask, and carry their state from one document to the next",
        ),
        (f"--dataloader-inter-document-masking {LOCAL}", "use --reset-attention-mask with local attention"),
        ("--window-size 8", "--window-size 8: give how many tokens before and after"),
        ("--window-size (-2,0)", "--window-size -2,0: give how many tokens before and after"),
        ("--window-size 8,8", "--window-size 8,8: attention is causal, .* give 8,0"),
        ("--window-attn-skip-freq 2", "give --window-size too"),
        ("--window-size 8,0 --window-attn-skip-freq [1,0]", "has 2 entries and the model 4 layers"),
    ],
)
def test_a_mask_that_attention_would_not_have_is_refused(monkeypatch, flags, error):
    with pytest.raises(UsageError, match=error):
        check(monkeypatch, flags)


@pytest.mark.parametrize(
    "flags",
    [
        "--bf16",
        f"--reset-attention-mask {LOCAL}",
        f"--reset-attention-mask {LOCAL} --bf16 --no-masked-softmax-fusion",
        "--reset-attention-mask --attention-backend local",
        "--dataloader-inter-document-masking --reset-attention-mask",
        "--dataloader-inter-document-masking --hybrid-layer-pattern M*-G",
        f"--reset-attention-mask {LOCAL} --hybrid-layer-pattern *-",
        "--window-size 8,0 --window-attn-skip-freq 2",
        "--window-size (-1,0) --window-attn-skip-freq [1,0]*2",
    ],
)
def test_one_that_it_has_is_not(monkeypatch, flags):
    check(monkeypatch, flags)
