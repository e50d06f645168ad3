"""Queries and keys are normed over all heads together; tests/parallel has it with tensor parallelism."""

import pytest
import torch

from megatron_periln.models.whole_query_norm import WholeNorm, norm_whole_queries
from tests.models import small

HEADS, CHANNELS, EPS = 4, 6, 1e-3


def norm(zero_centered=False):
    config = small.transformer_config(qk_layernorm=True, layernorm_zero_centered_gamma=zero_centered)
    built = WholeNorm(config=config, hidden_size=CHANNELS, eps=EPS, heads=HEADS)
    with torch.no_grad():
        built.weight.add_(0.3 * torch.randn(built.weight.shape))
    return built


@pytest.mark.parametrize("zero_centered", [False, True])
def test_the_mean_is_that_of_all_heads(zero_centered):
    built, x = norm(zero_centered), torch.randn(3, 2, HEADS, CHANNELS)
    flat = x.flatten(2)
    weight = built.weight + 1 if zero_centered else built.weight
    expected = torch.nn.functional.rms_norm(flat, flat.shape[-1:], weight, EPS).view(x.shape)
    torch.testing.assert_close(built(x), expected, atol=1e-6, rtol=1e-6)
    each = torch.nn.functional.rms_norm(x, x.shape[-1:], None, EPS) * weight.view(HEADS, CHANNELS)
    assert (built(x) - each).abs().max() > 0.05


def test_bf16_is_normed_in_fp32():
    built, x = norm(), torch.randn(3, 2, HEADS, CHANNELS).bfloat16()
    assert torch.equal(built(x), built(x.float()).bfloat16())


def test_ranks_that_share_keys_are_refused():
    config = small.transformer_config(qk_layernorm=True)
    config.num_query_groups, config.tensor_model_parallel_size = 2, 4
    with pytest.raises(ValueError, match="--whole-qk-norm needs at least as many"):
        norm_whole_queries(None, config)
