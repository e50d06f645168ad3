"""No layer adds to the residual stream past its norm: looked at when it is built, and after it has run."""

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megatron_periln.errors import UsageError
from megatron_periln.models import GPTModelBuilder
from megatron_periln.models.gpt import placed_layer_spec
from megatron_periln.models.residual_adds import SLOTS, check_calls, check_slots
from megatron_periln.norms import NormPlacement
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")


class Plain(nn.Module):
    """A layer of its own kind, which adds its output itself."""

    def __init__(self, config, **_):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)


class Bypassing(TransformerLayer):
    """It has the norm of its MLP, and adds that sublayer's output without it."""

    def _forward_post_mlp(self, mlp_output_with_bias, residual, *_):
        output, bias = mlp_output_with_bias
        return residual + (output if bias is None else output + bias)


def build(placement="peri", change=None, module=TransformerLayer):
    """Build a model whose layer spec is changed after its norms were placed."""
    config = small.model_config(small.transformer_config(), placement)
    spec = placed_layer_spec(config)
    for layer in spec.layer_specs[:1]:
        layer.module = module
        if change is not None:
            change(layer.submodules)
    small.seed()
    stock = GPTModelBuilder.__mro__[1](config)
    stock._model_config.transformer_layer_spec = spec
    return stock.build_model(small.groups())


@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_whole_models_pass(placement):
    model = build(placement)
    check_slots(model, NormPlacement.named(placement))
    small.run(model)
    check_calls(model)


@pytest.mark.parametrize("slot", ["self_attn_bda", "mlp_bda"])
def test_a_residual_add_of_megatrons(slot):
    model = build(change=lambda layer: setattr(layer, slot, get_bias_dropout_add))
    with pytest.raises(
        UsageError,
        match=rf"'peri': decoder\.layers\.0 \(TransformerLayer\) adds the output of its {SLOTS[slot]} with",
    ):
        check_slots(model, NormPlacement.named("peri"))


def test_the_norm_of_another_placement():
    model = build("post")
    with pytest.raises(UsageError, match=r"decoder\.layers\.0 .* of its self_attention without the norm"):
        check_slots(model, NormPlacement.named("peri"))
    check_slots(model, NormPlacement.named("pre"))  # which has none to miss


def test_a_layer_without_a_bias_dropout_add():
    model = build()
    model.decoder.layers[1] = Plain(model.config)
    with pytest.raises(UsageError, match=r"decoder\.layers\.1 \(Plain\) has no bias-dropout-add"):
        check_slots(model, NormPlacement.named("peri"))


def test_cross_attention_has_no_norm():
    model = build()
    model.decoder.layers[0].cross_attention = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="the output of its cross_attention without"):
        check_slots(model, NormPlacement.named("peri"))


def test_the_builder_asks():
    """For what a user's own layer spec brings."""
    spec = ModuleSpec(
        module=TransformerLayer,
        submodules=placed_layer_spec(small.model_config(small.transformer_config(), "pre"))
        .layer_specs[0]
        .submodules,
    )
    spec.submodules.cross_attention = ModuleSpec(module=_Silent)
    config = small.model_config(small.transformer_config(), "peri", transformer_layer_spec=spec)
    with pytest.raises(UsageError, match="its cross_attention without the norm"):
        GPTModelBuilder(config).build_model(small.groups())


class _Silent(nn.Module):
    def __init__(self, *_, **__):
        super().__init__()


def test_a_forward_pass_that_goes_round_a_norm():
    """Its slots are as they should be; only what ran tells."""
    model = build(module=Bypassing)
    check_slots(model, NormPlacement.named("peri"))
    small.run(model)
    with pytest.raises(
        UsageError, match=r"decoder\.layers\.0\.mlp_bda: its layer's forward pass does not call it"
    ):
        check_calls(model)
    check_calls(model)  # said once


def test_recomputation_calls_them_too():
    model = small.build(
        "peri",
        small.transformer_config(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        ),
    )
    model.train()
    small.run(model)
    check_calls(model)
    assert torch.is_grad_enabled()
