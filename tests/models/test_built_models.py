"""Mixture of experts, multi-latent attention, multi-token prediction and fp32 residual streams, run."""

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.models import gpt as stock

from megatron_periln.models.gpt import placed_layer_spec
from megatron_periln.norms import NormedBiasDropoutAdd, NormPlacement, OutputNorm, PostNorm
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")

NORM = {"peri": OutputNorm, "output": OutputNorm, "post": PostNorm}

MODELS = {
    "moe": (
        TransformerConfig,
        {
            "num_moe_experts": 4,
            "moe_layer_freq": [0, 1],
            "moe_shared_expert_intermediate_size": 24,
            "moe_router_load_balancing_type": "none",
            **small.SWIGLU,
        },
    ),
    "mla": (
        MLATransformerConfig,
        {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_head_dim": 8,
            "qk_pos_emb_head_dim": 4,
            "v_head_dim": 6,
            "qk_layernorm": True,
            "rope_type": "rope",
        },
    ),
    "mtp": (TransformerConfig, {"mtp_num_layers": 1}),
    "mtp-moe": (
        TransformerConfig,
        {
            "mtp_num_layers": 1,
            "num_moe_experts": 4,
            "moe_layer_freq": [0, 1],
            "moe_router_load_balancing_type": "none",
        },
    ),
}


def build(kind, placement):
    config_class, options = MODELS[kind]
    return small.perturb(small.build(placement, small.transformer_config(config_class, **options)), 0.1)


def transformer_layers(model):
    return [module for module in model.modules() if isinstance(module, TransformerLayer)]


@pytest.mark.parametrize("placement", NORM)
@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_has_the_placements_norms_and_every_weight_learns(kind, placement):
    model = build(kind, placement)
    layers = transformer_layers(model)
    assert len(layers) == small.LAYERS + kind.startswith("mtp")
    for layer in layers:
        assert type(layer.self_attn_bda) is type(layer.mlp_bda) is NormedBiasDropoutAdd
        assert type(layer.self_attn_bda.norm) is type(layer.mlp_bda.norm) is NORM[placement]
    gradients = small.gradients(model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    weights = [name for name in gradients if "_bda.norm." in name]
    assert len(weights) == 2 * len(layers)
    assert not [name for name in weights if not gradients[name].any()]


def test_the_models_are_what_they_are_called():
    moe, mla, mtp = (build(kind, "peri") for kind in ("moe", "mla", "mtp"))
    assert isinstance(moe.decoder.layers[1].mlp, MoELayer)
    assert moe.decoder.layers[1].mlp.shared_experts is not None
    assert isinstance(mla.decoder.layers[0].self_attention, MLASelfAttention)
    assert isinstance(mtp.mtp.layers[0].mtp_model_layer, TransformerLayer)


@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_only_post_has_no_final_norm_in_decoder_and_mtp(placement):
    model = build("mtp", placement)
    for block in (model.decoder, model.mtp.layers[0]):
        assert bool(list(block.final_layernorm.parameters())) == (placement != "post")


class OwnLayer(TransformerLayer): ...


def _layer(config):
    submodules = get_gpt_layer_local_submodules(normalization="RMSNorm", qk_layernorm=True)
    return ModuleSpec(OwnLayer, submodules=submodules)


def _block(config, vp_stage):
    return TransformerBlockSubmodules([_layer(config)] * small.LAYERS, WrappedTorchNorm)


@pytest.mark.parametrize(
    "layer_spec",
    [_layer(None), _block(None, None), _layer, _block],
    ids=["layer", "block", "layer-function", "block-function"],
)
@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_a_given_layer_spec_is_placed(layer_spec, placement):
    transformer = small.transformer_config(qk_layernorm=True)
    model = small.build(placement, transformer, transformer_layer_spec=layer_spec)
    assert [type(layer) for layer in model.decoder.layers] == [OwnLayer] * small.LAYERS
    names = dict(model.named_parameters())
    expected = NormPlacement.named(placement)
    for i in range(small.LAYERS):
        prefix = f"decoder.layers.{i}."
        assert prefix + "self_attention.q_layernorm.weight" in names
        assert (prefix + "input_layernorm.weight" in names) == expected.input
        assert (prefix + "self_attn_bda.norm.weight" in names) == (placement != "pre")
    assert ("decoder.final_layernorm.weight" in names) == expected.final
    assert small.run(model).isfinite().all()


def test_upstream_still_ignores_the_layer_spec_for_mtp():
    """`_placed_mtp_spec` is not needed any more once this fails."""
    transformer = small.transformer_config(mtp_num_layers=1)
    placed = placed_layer_spec(small.model_config(transformer, "peri"))
    config = small.model_config(
        transformer, "pre", config_class=stock.GPTModelConfig, transformer_layer_spec=placed
    )
    model = stock.GPTModelBuilder(config).build_model(small.groups())
    *decoder, mtp = transformer_layers(model)
    assert all(isinstance(layer.mlp_bda, NormedBiasDropoutAdd) for layer in decoder)
    assert not isinstance(mtp.mlp_bda, torch.nn.Module)


def test_building_restores_upstreams_mtp_spec():
    original = stock.mtp_block_spec
    build("mtp", "peri")
    assert stock.mtp_block_spec is original


@pytest.mark.parametrize("zero_centered_gamma", [False, True])
@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_the_residual_stream_stays_fp32_beside_bf16_weights(placement, zero_centered_gamma):
    transformer = small.transformer_config(
        bf16=True,
        params_dtype=torch.bfloat16,
        fp32_residual_connection=True,
        layernorm_zero_centered_gamma=zero_centered_gamma,
        add_bias_linear=True,
    )
    placement = NormPlacement.named(placement).with_options(embedding=True)
    model = small.build(placement, transformer)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with small.layer_outputs(model) as outputs:
        gradients = small.gradients(model)
    assert [output.dtype for output in outputs] == [torch.float32] * small.LAYERS
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert not [name for name, gradient in gradients.items() if "norm" in name and not gradient.any()]


def test_without_fp32_residual_connection_the_stream_is_bf16():
    transformer = small.transformer_config(bf16=True, params_dtype=torch.bfloat16)
    with small.layer_outputs(model := small.build("peri", transformer).bfloat16()) as outputs:
        small.run(model)
    assert {output.dtype for output in outputs} == {torch.bfloat16}


@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_output_norms_take_the_option_and_all_others_the_models_epsilon(placement):
    placement = NormPlacement.named(placement)
    output_eps = 0.3 if placement.output else None
    placement = placement.with_options(embedding=True, output_norm_epsilon=output_eps)
    model = small.build(placement, small.transformer_config(layernorm_epsilon=0.1, mtp_num_layers=1))
    epsilons = {name: module.eps for name, module in model.named_modules() if hasattr(module, "eps")}
    output_norms = {name for name in epsilons if "_bda." in name} if placement.output else set()
    assert {epsilons[name] for name in output_norms} == ({output_eps} if placement.output else set())
    assert {epsilons[name] for name in epsilons.keys() - output_norms} == {0.1}


@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_all_that_a_cuda_graph_of_a_part_holds_is_gathered_before(placement):
    """With ``--overlap-param-gather``: by hooks, which Megatron sets for the modules that it knows of."""
    layer = small.build(placement).decoder.layers[0]
    layer.config.cuda_graph_modules = [CudaGraphModule.attn, CudaGraphModule.mlp]
    layer.setup_manual_hooks(lambda: None)
    hooked = {id(module) for _, (module,) in layer.cuda_graph_manual_hooks}
    with_parameters = [each for each in layer.modules() if [*each.parameters(recurse=False)]]
    assert [each for each in with_parameters if id(each) not in hooked] == []
