"""Queries that latent attention does not compress are normed before they are projected, as by TE."""

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_periln.models.query_norm import LocalLatentAttention, NormedColumnParallelLinear
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")

LATENT = {
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "rope_type": "rope",
}


def config(**changes):
    changes = {"q_lora_rank": None, "qk_layernorm": True, **LATENT, **changes}
    return small.transformer_config(MLATransformerConfig, **changes)


def attention(**changes):
    model = small.perturb(small.build("peri", config(**changes)))
    return model, model.decoder.layers[0].self_attention


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_queries_are_projected_from_the_norm_of_the_input(normalization, zero_centered):
    options = {"normalization": normalization, "layernorm_zero_centered_gamma": zero_centered}
    _, built = attention(**options)
    linear = built.linear_q_proj
    x = torch.randn(3, 2, small.HIDDEN, dtype=torch.float64).float()
    centered = x - x.mean(-1, keepdim=True) if normalization == "LayerNorm" else x
    weight = linear.layer_norm_weight + 1 if zero_centered else linear.layer_norm_weight
    epsilon = built.config.layernorm_epsilon
    normed = centered / (centered.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight
    if normalization == "LayerNorm":
        normed = normed + linear.layer_norm_bias
    torch.testing.assert_close(linear(x)[0], normed @ linear.weight.T, atol=1e-5, rtol=1e-5)


def test_the_norm_is_trained():
    model, _ = attention()
    gradients = small.gradients(model)
    name = "decoder.layers.0.self_attention.linear_q_proj.layer_norm_weight"  # Transformer Engine's
    assert gradients[name].abs().max() > 0


def test_no_other_latent_attention_is_changed():
    for changes in ({"qk_layernorm": False}, {"q_lora_rank": 16}):
        _, built = attention(**changes)
        assert type(built) is MLASelfAttention
    assert type(attention()[1]) is LocalLatentAttention


def test_upstream_still_has_no_such_projection_of_its_own():
    """And refuses: the class can go once local layers have one."""
    layer = get_gpt_layer_local_submodules(multi_latent_attention=True, qk_layernorm=True)
    resolver = QKNormConfigResolver(config(), layer.self_attention.submodules)
    assert resolver.fused_norm_linear_impl is None
    with pytest.raises(ValueError, match="it will not be used"):
        resolver.resolve()
    assert issubclass(NormedColumnParallelLinear, resolver.linear_impl)
