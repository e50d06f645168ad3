"""Peri-LN with Transformer Engine's FP8 recipes, next to BF16."""

import pytest
import torch

from megatron_periln.norms import NormedBiasDropoutAdd
from tests.models import small

te = pytest.importorskip("transformer_engine.pytorch")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process")]

BIG_ENOUGH = {"hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


def loss_and_model(placement, **options):
    transformer = small.transformer_config(
        **small.SWIGLU, **BIG_ENOUGH, **BF16, transformer_impl="transformer_engine", **options
    )
    model = small.build(placement, transformer, seq_length=64).bfloat16().cuda()
    ids = torch.randint(small.VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(3)).cuda()
    positions = torch.arange(64, device="cuda").expand_as(ids)
    for _ in range(2):  # delayed scaling takes its scales from the first
        model.zero_grad()
        loss = model(ids, positions, None, labels=ids).float().mean()
        loss.backward()
    return loss.item(), model


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("placement", ["post", "peri", "output"])
def test_fp8_trains_as_bf16_does(recipe, placement):
    if recipe == "blockwise" and not te.fp8.check_fp8_block_scaling_support()[0]:
        pytest.skip("this GPU or Transformer Engine has no blockwise scaling")
    expected, _ = loss_and_model(placement)
    loss, model = loss_and_model(placement, fp8="hybrid", fp8_recipe=recipe)
    assert loss == pytest.approx(expected, rel=0.05)
    weights = [bda.norm.weight for bda in model.modules() if isinstance(bda, NormedBiasDropoutAdd)]
    assert len(weights) == 2 * small.LAYERS
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in weights)
