"""Megatron's model computes the same whichever backend its norms have."""

import pytest
import torch

from megatron_periln.norms import kernels
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process", "restored_backend")

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
KINDS = {
    "rmsnorm": {"normalization": "RMSNorm"},
    "layernorm-biases": {"normalization": "LayerNorm", "add_bias_linear": True},
    "zero-centered": {"normalization": "RMSNorm", "layernorm_zero_centered_gamma": True},
    "fp32-stream": {"normalization": "RMSNorm", "fp32_residual_connection": True},
    "moe": {"num_moe_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def results(backend, placement, **options):
    """Return the losses and every gradient of one model."""
    kernels.use_backend(backend)
    model = small.perturb(small.build(placement, small.transformer_config(**options)))
    small.seed(5)
    return {"losses": small.run(model).detach(), **small.gradients(model)}


def errors(mine, theirs):
    assert mine.keys() == theirs.keys()
    return {name: small.relative_error(mine[name], theirs[name]) for name in mine if mine[name] is not None}


@each_kind
@pytest.mark.parametrize("placement", ["peri", "output"])
def test_the_fused_kernel_computes_what_plain_torch_does(kind, placement):
    fused, plain = (results(backend, placement, **KINDS[kind]) for backend in ("triton", "torch"))
    assert max(errors(fused, plain).values()) < 1e-5


def test_another_epsilon_would_show():
    fused = results("triton", "peri", **KINDS["rmsnorm"], layernorm_epsilon=1e-3)
    assert max(errors(fused, results("torch", "peri", **KINDS["rmsnorm"])).values()) > 1e-3


@each_kind
def test_recomputation_gives_the_same_bits(kind):
    dropout = {"hidden_dropout": 0.3, "attention_dropout": 0.1}
    plain = results("triton", "peri", **KINDS[kind], **dropout)
    recomputed = results("triton", "peri", **KINDS[kind], **dropout, **FULL)
    assert [
        name for name in plain if plain[name] is not None and not torch.equal(plain[name], recomputed[name])
    ] == []


def test_a_lost_seed_would_show_in_recomputation(monkeypatch):
    from megatron.core.tensor_parallel import random

    options = {**KINDS["rmsnorm"], "hidden_dropout": 0.3}
    plain = results("triton", "peri", **options)
    monkeypatch.setattr(random, "_set_all_rng_states", lambda *_: None)
    assert max(errors(results("triton", "peri", **options, **FULL), plain).values()) > 1e-2
