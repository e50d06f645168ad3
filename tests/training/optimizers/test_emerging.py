"""Muon, SOAP and Lion: what they can't do is said before a model is built, and which share Muon trains."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from megatron_periln.rules import Problems
from megatron_periln.training.optimizers.emerging import EMERGING, describe_shares
from tests.training import flag_trials as trials


def problems(flags):
    found = Problems()
    args = trials.parser().parse_args(f"{trials.COMMON} {flags}".split())
    found.find(args, EMERGING)
    return found.texts


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--optimizer muon --fp16", "give --bf16 instead of --fp16"),
        ("--optimizer lion --use-distributed-optimizer", "distributed in bf16 alone; give --bf16"),
        ("--optimizer dist_muon", "give --optimizer muon for dist_muon"),
        ("--optimizer soap --save folder", "cannot save its state"),
        ("--optimizer soap --load folder", "drop --save and --load"),
        ("--optimizer adaptive_muon", "does not tell it how; give --optimizer muon"),
    ],
)
def test_what_they_cannot_do(flags, words):
    (text,) = problems(flags)
    assert words in text
    assert text.startswith(f"--optimizer {flags.split()[1]}: ")


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer muon --save folder --load folder",
        "--optimizer dist_muon --bf16",
        "--optimizer lion --bf16 --use-distributed-optimizer",
        "--optimizer soap",
        "--optimizer adam --fp16 --use-distributed-optimizer --save folder",
    ],
)
def test_what_they_can(flags):
    assert problems(flags) == []


def test_upstream_still_sets_no_scale_of_adaptive_muon():
    """Once it does, `EMERGING` lets it through by itself."""
    from megatron.core.optimizer.emerging_optimizers import TensorParallelAdaptiveMuon

    weight = nn.Parameter(torch.eye(4, 8))
    weight.grad = torch.ones(4, 8)
    with pytest.raises(AttributeError, match="scale_mode"):
        TensorParallelAdaptiveMuon([weight], lr=0.1).step()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.embedding.weight.is_embedding_or_output_parameter = True
        self.linear_fc1 = nn.Linear(4, 6)
        self.mlp_bda = nn.ModuleDict({"norm": nn.LayerNorm(4)})
        self.frozen = nn.Linear(4, 4, bias=False)
        self.frozen.weight.requires_grad = False


def args(**changes):
    defaults = {
        "optimizer": "muon",
        "muon_scalar_optimizer": "lion",
        "muon_tp_mode": "blockwise",
        "tensor_model_parallel_size": 1,
    }
    return Namespace(**{**defaults, **changes})


def test_the_shares_of_muon_are_said_once():
    model = Model()
    assert list(describe_shares(args(), model)) == [
        "muon trains 24 numbers of this rank: linear_fc1",
        "lion trains 34 numbers of this rank: embedding, linear_fc1.bias, mlp_bda.norm, mlp_bda.norm.bias",
    ]
    assert list(describe_shares(args(), model)) == []
    assert list(describe_shares(args(optimizer="adam"), Model())) == []


def test_the_shares_are_megatrons():
    from megatron.core.optimizer.emerging_optimizers import _is_nonlinear_or_embedding

    model = Model()
    muon = sum(p.numel() for p in model.parameters() if p.requires_grad and not _is_nonlinear_or_embedding(p))
    assert next(describe_shares(args(), model)).startswith(f"muon trains {muon} ")


@pytest.mark.parametrize(
    ("mode", "size", "said"), [("blockwise", 2, True), ("blockwise", 1, False), ("duplicated", 2, False)]
)
def test_parts_of_matrices_are_spoken_of(mode, size, said):
    lines = list(describe_shares(args(muon_tp_mode=mode, tensor_model_parallel_size=size), Model()))
    assert any("another --tensor-model-parallel-size trains otherwise" in line for line in lines) is said
