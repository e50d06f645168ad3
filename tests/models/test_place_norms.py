"""What `place_norms` changes in Megatron's own specs, and what it leaves alone."""

import functools
from dataclasses import fields, is_dataclass
from types import SimpleNamespace

import pytest
import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec, get_submodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_periln.models import place_norms
from megatron_periln.models.place_norms import separate_norm
from megatron_periln.norms import NoNorm, NormedBiasDropoutAdd, NormPlacement
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")

WITHOUT_INPUT_NORM = ("post", "output")
FUSED, PLAIN = te.TELayerNormColumnParallelLinear, te.TEColumnParallelLinear

each_placement = pytest.mark.parametrize("placement", small.PLACEMENTS)


def moe_config():
    return small.transformer_config(num_moe_experts=4, moe_layer_freq=[0, 1])


SPECS = {
    "local": lambda: specs.get_gpt_layer_local_spec(normalization="RMSNorm"),
    "local-qk-norm": lambda: specs.get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
    "local-mla": lambda: specs.get_gpt_layer_local_spec(multi_latent_attention=True, qk_layernorm=True),
    "local-moe-block": lambda: specs.get_gpt_decoder_block_spec(moe_config(), False),
    "local-mtp-block": lambda: mtp_block(),
    "te": lambda: specs.get_gpt_layer_with_transformer_engine_spec(),
    "te-moe": lambda: specs.get_gpt_layer_with_transformer_engine_spec(num_experts=4),
    "te-moe-block": lambda: specs.get_gpt_decoder_block_spec(moe_config(), True),
    "te-mla": lambda: te_mla(),
    "te-mla-fused-down-projection": lambda: te_mla(mla_down_proj_fusion=True),
}
each_spec = pytest.mark.parametrize("make_spec", SPECS.values(), ids=SPECS)


def te_mla(**options):
    return specs.get_gpt_layer_with_transformer_engine_spec(
        multi_latent_attention=True, qk_layernorm=True, **options
    )


def mtp_block():
    config = small.transformer_config(mtp_num_layers=1)
    return specs.get_gpt_mtp_block_spec(config, specs.get_gpt_layer_local_spec(), False)


def place(spec, placement):
    return place_norms(spec, NormPlacement.named(placement), small.transformer_config())


def layers(spec):
    """Return the submodules of every transformer layer in ``spec``."""
    if isinstance(spec, ModuleSpec):
        spec = spec.submodules
    if hasattr(spec, "layer_specs"):
        return [layer for part in spec.layer_specs for layer in layers(part)]
    return layers(spec.mtp_model_layer) if hasattr(spec, "mtp_model_layer") else [spec]


def snapshot(spec):
    """Return all that a spec holds, as nested tuples: equal before and after if nothing was mutated."""
    if isinstance(spec, functools.partial):
        return ("partial", spec.func, spec.args, snapshot(spec.keywords))
    if is_dataclass(spec) and not isinstance(spec, type):
        return (type(spec), *((f.name, snapshot(getattr(spec, f.name))) for f in fields(spec)))
    if isinstance(spec, dict):
        return ("dict", *((key, snapshot(value)) for key, value in spec.items()))
    return ("list", *map(snapshot, spec)) if isinstance(spec, list) else spec


@each_spec
@each_placement
def test_the_original_spec_is_not_mutated(make_spec, placement, te_specs):
    spec = make_spec()
    before = snapshot(spec)
    placed = place(spec, placement)
    assert snapshot(spec) == before
    assert (snapshot(placed) == before) == (placement == "pre")


@each_spec
@each_placement
def test_both_bias_dropout_adds_have_the_placements_norm(make_spec, placement, te_specs):
    for layer, stock in zip(layers(place(make_spec(), placement)), layers(make_spec()), strict=True):
        for name in ("self_attn_bda", "mlp_bda"):
            placed = getattr(layer, name)
            if placement == "pre":
                assert placed is getattr(stock, name)
            else:
                assert placed.module is NormedBiasDropoutAdd
                assert placed.params["placement"] is NormPlacement.named(placement)
        assert layer.cross_attn_bda is IdentityFuncOp


@each_spec
@each_placement
def test_input_norms_stay_or_become_casts(make_spec, placement, te_specs):
    for layer, stock in zip(layers(place(make_spec(), placement)), layers(make_spec()), strict=True):
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            expected = NoNorm if placement in WITHOUT_INPUT_NORM else getattr(stock, norm)
            assert getattr(layer, norm) is expected


@each_placement
def test_linears_fused_with_an_input_norm_become_plain_where_there_is_none(placement, te_specs):
    (layer,) = layers(place(te_specs(), placement))
    expected = PLAIN if placement in WITHOUT_INPUT_NORM else FUSED
    assert layer.self_attention.submodules.linear_qkv is expected
    assert get_submodules(layer.mlp).linear_fc1 is expected
    assert layer.self_attention.submodules.linear_proj is te.TERowParallelLinear
    assert get_submodules(layer.mlp).linear_fc2 is te.TERowParallelLinear


@each_placement
def test_linears_fused_with_query_and_key_norms_stay(placement, te_specs):
    for fused_down_projection in (False, True):
        spec = te_mla(mla_down_proj_fusion=fused_down_projection)
        (layer,) = layers(place(spec, placement))
        attention = layer.self_attention.submodules
        assert attention.linear_q_up_proj is attention.linear_kv_up_proj is FUSED
        assert get_submodules(layer.mlp).linear_fc1 is (PLAIN if placement in WITHOUT_INPUT_NORM else FUSED)
    if placement in WITHOUT_INPUT_NORM:
        assert attention.linear_qkv_down_proj is PLAIN
    else:
        assert attention.linear_qkv_down_proj is FUSED


APART = {
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    "fused with the residual": {"normalization": "RMSNorm", "fused_residual_rmsnorm": True},
}


@pytest.mark.parametrize("options", APART.values(), ids=APART)
@pytest.mark.parametrize("placement", ["pre", "peri"])
def test_what_megatron_does_with_norms_alone_reaches_the_input_norms_of_peri(options, placement, te_specs):
    placed = {}
    for name in ("te", "te-mla-fused-down-projection"):
        config = small.transformer_config(**options)
        (placed[name],) = layers(place_norms(SPECS[name](), NormPlacement.named(placement), config))
    dense, latent = placed["te"], placed["te-mla-fused-down-projection"]
    keys = dense.sharded_state_dict_keys_map
    linears = (
        dense.self_attention.submodules.linear_qkv,
        get_submodules(dense.mlp).linear_fc1,
        latent.self_attention.submodules.linear_qkv_down_proj,
        get_submodules(latent.mlp).linear_fc1,
    )
    norms = (dense.input_layernorm, dense.pre_mlp_layernorm, latent.input_layernorm, latent.pre_mlp_layernorm)
    if placement == "pre":
        assert set(linears) == {FUSED}
        assert set(norms) == {IdentityOp}
        return
    assert set(linears) == {PLAIN}
    assert set(norms) == {separate_norm}
    assert keys["input_layernorm."] == "self_attention.linear_qkv.layer_norm_"
    assert keys["pre_mlp_layernorm."] == "mlp.linear_fc1.layer_norm_"
    assert "input_layernorm." not in latent.sharded_state_dict_keys_map
    assert latent.self_attention.submodules.linear_q_up_proj is FUSED


def test_a_separate_norm_is_saved_without_an_extra_state(monkeypatch):
    """As the norm inside a linear is; Transformer Engine's own norms have one."""

    class Norm(torch.nn.LayerNorm):
        def get_extra_state(self):
            return torch.empty(0)

        def set_extra_state(self, state):
            assert state.numel() == 0

    monkeypatch.setattr(te, "TENorm", lambda config, size, eps, has_residual: Norm(size, eps))
    norm = separate_norm(None, 8, 1e-6)
    assert "_extra_state" in Norm(8).state_dict()
    assert sorted(norm.state_dict()) == ["bias", "weight"]
    norm.load_state_dict(torch.nn.LayerNorm(8).state_dict(), strict=True)
    assert type(norm).__name__ == "Norm"
    assert isinstance(norm, Norm)


@each_placement
def test_query_and_key_norms_of_local_layers_stay(placement):
    for make in (SPECS["local-qk-norm"], SPECS["local-mla"]):
        stock, placed = (layers(spec)[0].self_attention for spec in (make(), place(make(), placement)))
        assert placed == stock


@each_placement
def test_moe_layers_keep_their_experts(placement, te_specs):
    for use_te in (False, True):
        stock = specs.get_gpt_decoder_block_spec(moe_config(), use_te)
        moe_layer = layers(place(stock, placement))[1]
        assert moe_layer.mlp is layers(stock)[1].mlp
        assert hasattr(get_submodules(moe_layer.mlp), "experts")


@each_placement
def test_only_post_drops_the_final_norm(placement, te_specs):
    for use_te in (False, True):
        stock = specs.get_gpt_decoder_block_spec(moe_config(), use_te)
        placed = place(stock, placement)
        assert isinstance(placed, TransformerBlockSubmodules)
        assert placed.layer_norm is (NoNorm if placement == "post" else stock.layer_norm)


@each_placement
def test_mtp_layers_keep_their_own_norms_and_lose_the_final_one_with_post(placement):
    stock = mtp_block().layer_specs[0].submodules
    placed = place(mtp_block(), placement).layer_specs[0].submodules
    assert (placed.enorm, placed.hnorm, placed.eh_proj) == (stock.enorm, stock.hnorm, stock.eh_proj)
    assert placed.layer_norm is (NoNorm if placement == "post" else stock.layer_norm)


def test_a_sublayer_that_does_nothing_gets_no_norm():
    spec = specs.get_gpt_layer_local_spec()
    spec.submodules.mlp_bda = IdentityFuncOp
    (layer,) = layers(place(spec, "peri"))
    assert layer.mlp_bda is IdentityFuncOp
    assert layer.self_attn_bda.module is NormedBiasDropoutAdd


@pytest.mark.parametrize("name", ["TEFusedMLP", "TEFusedMLPWithGroupedLinear"])
@each_placement
def test_an_mlp_fused_with_its_input_norm_is_refused_without_one(placement, name, te_specs, monkeypatch):
    fused_mlp = type(name, (MLP,), {})
    for module in (te, specs):
        monkeypatch.setattr(module, name, fused_mlp)
    spec = te_specs(use_te_op_fuser=True, use_grouped_gemm_for_dense_mlp=name != "TEFusedMLP")
    if placement in WITHOUT_INPUT_NORM:
        with pytest.raises(ValueError, match=f"transformer-engine-op-fuser.*'{placement}' has no input norm"):
            place(spec, placement)
    else:
        (layer,) = layers(place(spec, placement))
        assert layer.mlp.func.__self__ is fused_mlp


@pytest.mark.parametrize(
    "wrong",
    [None, MLP, SimpleNamespace(submodules=None), ModuleSpec(module=MLP)],
    ids=["none", "class", "something-else", "spec-without-submodules"],
)
def test_what_is_no_layer_or_block_spec_is_refused(wrong):
    with pytest.raises(TypeError, match="layer or block spec"):
        place(wrong, "peri")


class InferenceLayerNormLinear:
    """A linear that normalizes its input, and that `place_norms` does not know."""


@pytest.mark.parametrize("placement", WITHOUT_INPUT_NORM)
def test_an_unknown_linear_that_normalizes_its_input_is_refused(te_specs, placement):
    spec = SPECS["te"]()
    attention = spec.submodules.self_attention
    attention.submodules.linear_qkv = InferenceLayerNormLinear
    with pytest.raises(
        ValueError, match=r"InferenceLayerNormLinear normalizes its input.*choose pre or peri"
    ):
        place(spec, placement)
    spec.submodules.self_attention = InferenceLayerNormLinear
    with pytest.raises(ValueError, match="InferenceLayerNormLinear normalizes its input"):
        place(spec, placement)
    place(spec, "peri")


def test_inference_that_skips_the_bias_dropout_adds_is_refused():
    config = small.transformer_config()
    config.inference_fuse_tp_communication = True
    place_norms(SPECS["local"](), NormPlacement.named("pre"), config)
    with pytest.raises(ValueError, match="inference_fuse_tp_communication"):
        place_norms(SPECS["local"](), NormPlacement.named("peri"), config)
