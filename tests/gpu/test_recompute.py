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
