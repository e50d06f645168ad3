"""Transformer Engine's layers with each placement, next to Megatron's local ones with the same weights."""

import pytest
import torch

from megatron_periln.norms import NormedBiasDropoutAdd
from tests.models import engine, small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.rehearsed,
    pytest.mark.usefixtures("single_process", "transformer_engine"),
]

BF16 = {"params_dtype": torch.bfloat16, "bf16": True, "pipeline_dtype": torch.bfloat16}
APART = {
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    "fused with the residual": {"fused_residual_rmsnorm": True},
    "fp32 residual": {"fp32_residual_connection": True},
}


def build(placement, implementation="transformer_engine", fuse_pre_mlp_norm=False, **options):
    transformer = small.transformer_config(**small.SWIGLU, transformer_impl=implementation, **options)
    model = engine.perturb(small.build(placement, transformer, fuse_pre_mlp_norm=fuse_pre_mlp_norm))
    return model.cuda()


def inputs():
    ids = small.tokens()[0].cuda()
    return ids, torch.arange(small.SEQUENCE, device="cuda").expand_as(ids), None


def losses_and_gradients(model):
    ids, *rest = inputs()
    losses = model(ids, *rest, labels=ids)
    losses.mean().backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return losses.detach(), engine.as_local(named)


@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_transformer_engine_agrees_with_local_layers(placement):
    theirs, local = build(placement), build(placement, "local")
    engine.load_as_local(local, theirs.state_dict())
    assert small.relative_error(theirs(*inputs()), local(*inputs())) < 3e-3  # TF32


@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_an_fp32_residual_agrees_with_that_of_local_layers(placement):
    options = {**BF16, "fp32_residual_connection": True}
    theirs, local = build(placement, **options), build(placement, "local", **options)
    engine.load_as_local(local, theirs.state_dict())
    assert small.relative_error(theirs(*inputs()).float(), local(*inputs()).float()) < 3e-2


@pytest.mark.parametrize("placement", ["post", "peri", "output"])
def test_every_norm_weight_gets_a_gradient(placement):
    model = build(placement)
    losses_and_gradients(model)
    bdas = [module for module in model.modules() if isinstance(module, NormedBiasDropoutAdd)]
    assert len(bdas) == 2 * small.LAYERS
    assert all(bda.norm.weight.grad.abs().max() > 0 for bda in bdas)


def test_the_fused_input_norm_agrees_with_that_of_transformer_engine():
    (mine, gradients), (theirs, expected) = (
        losses_and_gradients(build("peri", fuse_pre_mlp_norm=fuse)) for fuse in (True, False)
    )
    assert small.relative_error(mine, theirs) < 1e-3
    assert gradients.keys() == expected.keys()
    assert max(small.relative_error(gradients[name], expected[name]) for name in expected) < 2e-2


@pytest.mark.parametrize("options", APART.values(), ids=APART)
def test_a_checkpoint_has_the_same_keys_wherever_input_norms_stand(options):
    def keys(fuse=False, **options):
        saved = build("peri", fuse_pre_mlp_norm=fuse, **options).sharded_state_dict().values()
        return {part.key for part in saved if hasattr(part, "key")}

    assert keys(**options) == keys() == keys(fuse=True)
