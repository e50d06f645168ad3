"""Which parameters and modules are fixed; that the gradients come out right, tests/parallel shows."""

from types import SimpleNamespace

import pytest
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_periln.patches.tensor_parallel_gradients import fix_latent_attention
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")


def attentions(**changes):
    latent = {
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 8,
        "rope_type": "rope",
    }
    transformer = small.transformer_config(
        MLATransformerConfig, multi_latent_attention=True, **{"qk_layernorm": True, **latent, **changes}
    )
    model = small.build("peri", transformer)
    found = [module for module in model.modules() if isinstance(module, MLASelfAttention)]
    assert len(found) == small.LAYERS
    return model, found


def fix(model, found, ranks):
    for attention in found:
        attention.tp_group = SimpleNamespace(size=lambda: ranks)
    fix_latent_attention(model)


def test_query_norms_are_averaged_and_down_projections_widened():
    model, found = attentions(q_lora_rank=16)
    fix(model, found, ranks=2)
    for attention in found:
        assert all(p.average_gradients_across_tp_domain for p in attention.q_layernorm.parameters())
        assert len(attention.linear_kv_down_proj._forward_hooks) == 1


def test_one_rank_needs_no_fix():
    model, found = attentions(q_lora_rank=16)
    fix(model, found, ranks=1)
    for attention in found:
        assert not any(hasattr(p, "average_gradients_across_tp_domain") for p in attention.parameters())
        assert not attention.linear_kv_down_proj._forward_hooks


def test_queries_that_are_not_compressed_have_no_norm():
    model, found = attentions(q_lora_rank=None, qk_layernorm=False)
    fix(model, found, ranks=2)
    assert all(len(attention.linear_kv_down_proj._forward_hooks) == 1 for attention in found)
