"""Transformer Engine's layers with each placement, next to Megatron's local ones with the same weights."""

import pytest
import torch

from megatron_periln.norms import NormedBiasDropoutAdd
from tests.models import small

pytest.importorskip("transformer_engine")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process")]

FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def build(placement, implementation):
    transformer = small.transformer_config(**small.SWIGLU, transformer_impl=implementation)
    return small.build(placement, transformer).cuda()


def as_local(state):
    renamed = {}
    for name, weight in state.items():
        if "_extra_state" in name:
            continue
        for fused, own in FUSED.items():
            name = name.replace(fused, own)
        renamed[name] = weight
    return renamed


@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_transformer_engine_agrees_with_local_layers(placement):
    engine, local = build(placement, "transformer_engine"), build(placement, "local")
    local.load_state_dict(as_local(engine.state_dict()))
    ids = small.tokens()[0].cuda()
    positions = torch.arange(small.SEQUENCE, device="cuda").expand_as(ids)
    expected = local(ids, positions, None)
    assert small.relative_error(engine(ids, positions, None), expected) < 3e-3  # TF32


@pytest.mark.parametrize("placement", ["post", "peri", "output"])
def test_every_norm_weight_gets_a_gradient(placement):
    model = build(placement, "transformer_engine")
    ids = small.tokens()[0].cuda()
    positions = torch.arange(small.SEQUENCE, device="cuda").expand_as(ids)
    model(ids, positions, None, labels=ids).mean().backward()
    bdas = [module for module in model.modules() if isinstance(module, NormedBiasDropoutAdd)]
    assert len(bdas) == 2 * small.LAYERS
    assert all(bda.norm.weight.grad.abs().max() > 0 for bda in bdas)


def test_the_fused_input_norm_agrees_with_that_of_transformer_engine():
    def losses(fuse):
        transformer = small.transformer_config(**small.SWIGLU, transformer_impl="transformer_engine")
        model = small.build("peri", transformer, fuse_pre_mlp_norm=fuse).cuda()
        ids = small.tokens()[0].cuda()
        positions = torch.arange(small.SEQUENCE, device="cuda").expand_as(ids)
        out = model(ids, positions, None, labels=ids)
        out.mean().backward()
        return out.detach(), [parameter.grad for parameter in model.parameters()]

    (mine, gradients), (theirs, expected) = losses(True), losses(False)
    assert small.relative_error(mine, theirs) < 1e-3
    assert sorted(g.norm().item() for g in gradients) == pytest.approx(
        sorted(g.norm().item() for g in expected), rel=1e-2
    )


@pytest.mark.parametrize(
    "options",
    [
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
        {"fused_residual_rmsnorm": True},
    ],
    ids=["recomputed", "fused with the residual"],
)
def test_a_checkpoint_has_the_same_keys_wherever_input_norms_stand(options):
    def keys(fuse=False, **options):
        transformer = small.transformer_config(
            **small.SWIGLU, transformer_impl="transformer_engine", **options
        )
        model = small.build("peri", transformer, fuse_pre_mlp_norm=fuse)
        return {part.key for part in model.sharded_state_dict().values() if hasattr(part, "key")}

    assert keys(**options) == keys() == keys(fuse=True)
