"""Recomputation on the GPU replays the norms' dropout bit for bit, whoever computes them."""

import pytest
import torch

from megatron_periln.norms import kernels
from tests.gpu.conftest import HAVE_GPU
from tests.models import engine, small

pytestmark = [pytest.mark.gpu, pytest.mark.rehearsed, pytest.mark.usefixtures("single_process")]

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
NORMS = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
ENGINE = {"transformer_impl": "transformer_engine"}


def build(placement, **options):
    options = {"hidden_dropout": 0.3, "attention_dropout": 0.0, **options}
    transformer = small.transformer_config(**small.SWIGLU, **options)
    return engine.perturb(small.build(placement, transformer)).cuda()


def gradients(model):
    """Return the gradients by the names that local layers have."""
    ids = small.tokens()[0].cuda()
    positions = torch.arange(small.SEQUENCE, device="cuda").expand_as(ids)
    small.seed(5)
    model(ids, positions, None, labels=ids).mean().backward()
    return engine.as_local({name: parameter.grad for name, parameter in model.named_parameters()})


def worst(actual, expected):
    """Return the largest relative error of a gradient."""
    assert actual.keys() == expected.keys()
    return max(small.relative_error(actual[name], expected[name]) for name in expected)


@pytest.fixture(params=["triton", "compile", "torch"])
def backend(request):
    if request.param == "triton" and not HAVE_GPU:
        pytest.skip("tests/models/test_norm_backends.py has them interpreted")
    kernels.use_backend(request.param)
    yield
    kernels.use_backend("auto")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("placement", ["post", "peri", "output"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_full_recomputation_gives_the_same_bits(placement, implementation, request):
    """An error of rounding would be 1e-6; that of another mask is about 1, as the next test shows."""
    if implementation == "transformer_engine":
        request.getfixturevalue("transformer_engine")
    plain = gradients(build(placement, transformer_impl=implementation))
    recomputed = gradients(build(placement, transformer_impl=implementation, **FULL))
    assert worst(recomputed, plain) == 0


@pytest.mark.usefixtures("backend")
def test_another_mask_would_show(monkeypatch):
    from megatron.core.tensor_parallel import random

    plain = gradients(build("peri"))
    monkeypatch.setattr(random, "_set_all_rng_states", lambda *_: None)
    assert worst(gradients(build("peri", **FULL)), plain) > 1e-2


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("options", [NORMS, {"fused_residual_rmsnorm": True}], ids=["recomputed", "fused"])
def test_input_norms_that_stand_apart_give_the_same_gradients(options):
    plain, apart = gradients(build("peri", **ENGINE)), gradients(build("peri", **ENGINE, **options))
    assert worst(apart, plain) < 1e-2


@pytest.mark.usefixtures("transformer_engine")
def test_recomputing_input_norms_gives_back_what_output_norms_keep():
    """With Transformer Engine's norms, whose linears would keep the normed input."""
    if not HAVE_GPU:
        pytest.skip("the CPU doesn't count what is allocated")
    kept("peri")  # which also allocates what is kept for good
    assert kept("peri", **NORMS) < kept("peri")


def kept(placement, **options):
    """Return the bytes that a forward pass keeps for the backward pass."""
    model = build(placement, **ENGINE, **options, hidden_dropout=0.0)
    ids = small.tokens()[0].cuda().repeat(8, 1)
    positions = torch.arange(small.SEQUENCE, device="cuda").expand_as(ids)
    before = torch.cuda.memory_allocated()
    loss = model(ids, positions, None, labels=ids).mean()
    after = torch.cuda.memory_allocated()
    del loss
    return after - before
