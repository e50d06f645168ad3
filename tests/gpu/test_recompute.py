"""Recomputation on the GPU replays the fused kernels' dropout bit for bit."""

import pytest
import torch

from megatron_periln.norms import kernels
from tests.models import small

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process")]

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def gradients(placement, **options):
    transformer = small.transformer_config(
        **small.SWIGLU, hidden_dropout=0.3, attention_dropout=0.0, **options
    )
    model = small.perturb(small.build(placement, transformer).cpu()).cuda()
    ids = small.tokens()[0].cuda()
    positions = torch.arange(small.SEQUENCE, device="cuda").expand_as(ids)
    small.seed(5)
    model(ids, positions, None, labels=ids).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("placement", ["peri", "output"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
@pytest.mark.parametrize("backend", ["triton", "compile", "torch"])
def test_full_recomputation_gives_the_same_bits(placement, implementation, backend):
    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine")
    kernels.use_backend(backend)
    try:
        plain = gradients(placement, transformer_impl=implementation)
        recomputed = gradients(placement, transformer_impl=implementation, **FULL)
    finally:
        kernels.use_backend("auto")
    assert [name for name in plain if not torch.equal(plain[name], recomputed[name])] == []


NORMS = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}


def test_recomputing_input_norms_gives_back_what_output_norms_keep():
    """With Transformer Engine's norms, whose linears would keep the normed input."""
    pytest.importorskip("transformer_engine")
    plain, recomputed = (
        gradients("peri", transformer_impl="transformer_engine", **options) for options in ({}, NORMS)
    )
    assert sorted(g.norm().item() for g in recomputed.values()) == pytest.approx(
        sorted(g.norm().item() for g in plain.values()), rel=1e-2
    )
    kept("peri")  # which also allocates what is kept for good
    assert kept("peri", **NORMS) < kept("peri")


def kept(placement, **options):
    """Return the bytes that a forward pass keeps for the backward pass."""
    transformer = small.transformer_config(**small.SWIGLU, transformer_impl="transformer_engine", **options)
    model = small.build(placement, transformer).cuda()
    ids = small.tokens()[0].cuda().repeat(8, 1)
    positions = torch.arange(small.SEQUENCE, device="cuda").expand_as(ids)
    before = torch.cuda.memory_allocated()
    loss = model(ids, positions, None, labels=ids).mean()
    after = torch.cuda.memory_allocated()
    del loss
    return after - before


def test_the_residual_fused_with_the_norm_of_transformer_engine():
    pytest.importorskip("transformer_engine")
    options = {"transformer_impl": "transformer_engine", "normalization": "RMSNorm"}
    plain, fused = (gradients("peri", **options, fused_residual_rmsnorm=fuse) for fuse in (False, True))
    assert sorted(g.norm().item() for g in fused.values()) == pytest.approx(
        sorted(g.norm().item() for g in plain.values()), rel=1e-2
    )
