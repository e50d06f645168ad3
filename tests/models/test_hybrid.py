"""HybridModel with the pattern ``*-*-`` is GPTModel, sublayer by sublayer."""

import pytest
import torch

from megatron_periln.models import HybridModelBuilder, HybridModelConfig
from megatron_periln.norms import NormedBiasDropoutAdd, NormPlacement
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")

KINDS = {
    "modern": {**small.SWIGLU, "num_query_groups": 2},
    "biased": {"normalization": "LayerNorm", "add_bias_linear": True},
    "zero-centered": {**small.SWIGLU, "layernorm_zero_centered_gamma": True},
}
OF_ATTENTION = ("input_layernorm", "self_attention", "self_attn_bda")


def hybrid(placement, kind, layers=small.LAYERS, pattern=None, **changes):
    small.seed()
    transformer = small.transformer_config(
        num_layers=2 * layers, is_hybrid_model=True, **KINDS[kind], **changes
    )
    config = HybridModelConfig(
        transformer=transformer,
        norm_placement=placement,
        hybrid_layer_pattern=pattern or "*-" * layers,
        vocab_size=small.VOCABULARY,
        seq_length=small.SEQUENCE,
        position_embedding_type="rope",
    )
    return HybridModelBuilder(config).build_model(small.groups())


def as_hybrid(state):
    """Rename a GPTModel's weights to those of a HybridModel."""
    renamed = {}
    for name, weight in state.items():
        parts = name.replace("final_layernorm", "final_norm").split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(2 * int(parts[2]) + (parts[3] not in OF_ATTENTION))
        renamed[".".join(parts)] = weight
    return renamed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", small.PLACEMENTS)
def test_the_logits_are_those_of_gpt_bit_for_bit(name, kind):
    gpt = small.perturb(small.build(name, small.transformer_config(**KINDS[kind])))
    model = hybrid(NormPlacement.named(name), kind)
    model.load_state_dict(as_hybrid(gpt.state_dict()))
    assert torch.equal(small.run(model, labels=False), small.run(gpt, labels=False))
    gradients = as_hybrid(small.gradients(gpt))
    for parameter, gradient in small.gradients(model).items():
        assert torch.equal(gradient, gradients[parameter]), parameter


def test_another_placement_has_other_logits():
    gpt = small.build("output", small.transformer_config(**KINDS["modern"]))
    model = hybrid(NormPlacement.named("post").with_options(embedding=True), "modern")
    model.load_state_dict(as_hybrid(gpt.state_dict()), strict=False)
    assert not torch.allclose(small.run(model, labels=False), small.run(gpt, labels=False), atol=1e-2)


def test_depth_counts_pairs_of_sublayers():
    placement = NormPlacement.named("peri").with_options(output_norm_init="depth-scaled")
    model = hybrid(placement, "modern", layers=4)
    weights = [bda.norm.weight for bda in model.modules() if isinstance(bda, NormedBiasDropoutAdd)]
    assert len(weights) == 8
    assert all(torch.equal(weight, torch.full_like(weight, 0.5)) for weight in weights)


def test_experts_have_their_output_norm():
    model = hybrid(
        NormPlacement.named("peri"), "modern", pattern="*-*E", num_moe_experts=4, moe_ffn_hidden_size=32
    )
    gradients = small.gradients(model)
    assert gradients["decoder.layers.3.mlp_bda.norm.weight"].abs().max() > 0


def test_layers_without_a_place_for_output_norms_are_refused():
    with pytest.raises(ValueError, match="no place in layers M; use layers"):
        hybrid(NormPlacement.named("peri"), "modern", pattern="*-M-")
