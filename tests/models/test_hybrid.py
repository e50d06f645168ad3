"""HybridModel with the pattern ``*-*-`` is GPTModel, sublayer by sublayer."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.identity_op import IdentityOp

from megatron_periln.models import HybridModelBuilder, HybridModelConfig, place_norms
from megatron_periln.norms import InputNorm, NoNorm, NormedBiasDropoutAdd, NormPlacement
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")

KINDS = {
    "modern": {**small.SWIGLU, "num_query_groups": 2},
    "biased": {"normalization": "LayerNorm", "add_bias_linear": True},
    "zero-centered": {**small.SWIGLU, "layernorm_zero_centered_gamma": True},
}
OF_ATTENTION = ("input_layernorm", "self_attention", "self_attn_bda")


def hybrid(placement, kind, layers=small.LAYERS, pattern=None, seed=1234, **changes):
    small.seed(seed)
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
        parts = name.replace("decoder.final_layernorm", "decoder.final_norm").split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(2 * int(parts[2]) + (parts[3] not in OF_ATTENTION))
        if parts[3:4] == ["mtp_model_layer"]:
            parts[4:4] = ["layers", str(int(parts[4] not in OF_ATTENTION))]
        renamed[".".join(parts)] = weight
    return renamed


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in small.PLACEMENTS for kind in KINDS),
        *((name, "modern") for name in ("keel", "scaled-peri", "gated-peri", "gpas")),
    ],
)
def test_the_logits_are_those_of_gpt_bit_for_bit(name, kind):
    gpt = small.perturb(small.build(name, small.transformer_config(**KINDS[kind])))
    model = hybrid(NormPlacement.named(name), kind)
    model.load_state_dict(as_hybrid(gpt.state_dict()))
    assert torch.equal(small.run(model, labels=False), small.run(gpt, labels=False))
    gradients = as_hybrid(small.gradients(gpt))
    for parameter, gradient in small.gradients(model).items():
        assert torch.equal(gradient, gradients[parameter]), parameter


@pytest.mark.parametrize("name", [*small.PLACEMENTS, "keel", "gated-peri", "gpas"])
def test_multi_token_prediction_is_that_of_gpt_bit_for_bit(name):
    changes = {**KINDS["modern"], "mtp_num_layers": 1}
    gpt = small.perturb(small.build(name, small.transformer_config(**changes)))
    model = hybrid(NormPlacement.named(name), "modern", pattern="*-*-/*-", mtp_num_layers=1)
    model.load_state_dict(as_hybrid(gpt.state_dict()))
    assert torch.equal(small.run(model), small.run(gpt))
    gradients = as_hybrid(small.gradients(gpt))
    assert gradients["mtp.layers.0.mtp_model_layer.layers.1.mlp.linear_fc2.weight"].abs().max() > 0
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


STATEFUL = {
    "mamba_state_dim": 8,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
OF_LAYER = {"M": ("mixer", "norm", "mamba_bda"), "G": ("self_attention", "input_layernorm", "self_attn_bda")}


@pytest.fixture(params=["M", "G"])
def symbol(request):
    return request.param


def stateful(placement, symbol, changed=None, **changes):
    rule = NormPlacement.named(placement).changed(changed or {})
    return hybrid(rule, "modern", 2, pattern=f"{symbol}-*-", **STATEFUL, **changes)


@pytest.mark.parametrize("name", small.PLACEMENTS)
def test_layers_that_carry_a_state_have_the_placements_norms(name, symbol):
    """Their output against the placement's formula, with torch's own norm."""
    model = small.perturb(stateful(name, symbol), 0.1)
    layer, placement = model.decoder.layers[0], NormPlacement.named(name)
    sublayer, norm, bda = (getattr(layer, part) for part in OF_LAYER[symbol])
    x = torch.randn(small.SEQUENCE, 2, small.HIDDEN, generator=torch.Generator().manual_seed(5))

    def normed(tensor, weight):
        return F.rms_norm(tensor, tensor.shape[-1:], weight, eps=model.config.layernorm_epsilon)

    inner = normed(x, norm.weight) if placement.input else x
    outer, _ = sublayer(inner) if symbol == "M" else sublayer(inner, None)
    expected = x + (normed(outer, bda.norm.weight) if placement.output else outer)
    if placement.after_add:
        expected = normed(expected, bda.norm.weight)
    output = layer(x, attention_mask=None)
    torch.testing.assert_close(output[0] if isinstance(output, tuple) else output, expected)
    without = x + outer
    assert name == "pre" or not torch.allclose(expected, without, atol=1e-2)


@pytest.mark.parametrize("name", small.PLACEMENTS)
def test_every_weight_of_such_layers_learns(name, symbol):
    gradients = small.gradients(small.perturb(stateful(name, symbol), 0.1))
    layer = {parameter: g for parameter, g in gradients.items() if parameter.startswith("decoder.layers.0.")}
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in layer.values())
    assert any("_bda.norm." in parameter for parameter in layer) == (name != "pre")


def test_both_ways_through_a_mamba_layer_are_one_function():
    fused = small.perturb(stateful("peri", "M"), 0.1)
    apart = stateful("peri", "M", use_mamba_mem_eff_path=False)
    apart.load_state_dict(fused.state_dict())
    torch.testing.assert_close(small.run(apart), small.run(fused))


def test_recomputation_of_such_layers_changes_nothing(symbol):
    model = small.perturb(stateful("peri", symbol), 0.1)
    whole = {name: gradient.clone() for name, gradient in small.gradients(model).items()}
    again = stateful(
        "peri",
        symbol,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    again.load_state_dict(model.state_dict())
    for name, gradient in small.gradients(again).items():
        assert torch.equal(gradient, whole[name]), name


def test_their_input_norms_are_saved_as_transformer_engine_saves_its_own(symbol):
    state = stateful("peri", symbol).sharded_state_dict()
    keys = {tensor.key for name, tensor in state.items() if name.startswith("decoder.layers.0.")}
    prefix = {"M": "mixer", "G": "self_attention"}[symbol]
    assert f"decoder.layers.0.{prefix}.in_proj.layer_norm_weight" in keys
    assert not any(".norm.weight" in key and "mixer.norm" not in key and "_bda" not in key for key in keys)
    assert not any("input_layernorm" in key for key in keys)


OF_ENGINE = {"M": "mamba_layer", "G": "gdn_layer"}


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("name", small.PLACEMENTS)
def test_norms_in_transformer_engines_layers(name, symbol, fp32):
    """A gated delta net's norm stands apart from its linear where the stream is fp32; Mamba's sees none."""
    placement = NormPlacement.named(name)
    config = small.transformer_config(
        transformer_impl="transformer_engine", fp32_residual_connection=fp32, is_hybrid_model=True
    )
    spec = getattr(hybrid_stack_spec.submodules, OF_ENGINE[symbol])
    placed = place_norms(spec, placement, config).submodules
    sublayer, norm, bda = (getattr(placed, part) for part in OF_LAYER[symbol])
    apart = not placement.input or (symbol == "G" and fp32)
    fused = te.TEColumnParallelLinear if apart else te.TELayerNormColumnParallelLinear
    assert sublayer.submodules.in_proj is fused
    assert norm is (NoNorm if not placement.input else InputNorm if apart else IdentityOp)
    assert (getattr(bda, "module", None) is NormedBiasDropoutAdd) == (name != "pre")
    if placement.input and apart:
        keys = placed.sharded_state_dict_keys_map
        assert keys["input_layernorm."] == "self_attention.in_proj.layer_norm_"
