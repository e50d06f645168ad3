"""What the named rules' papers say of a model at initialization, measured on built models."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as te
from megatron.core.transformer.spec_utils import get_submodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_periln.errors import UsageError
from megatron_periln.models import GPTModelBuilder
from megatron_periln.models.gpt import placed_layer_spec
from megatron_periln.models.place_norms import place_norms
from megatron_periln.models.residual_adds import check_calls, check_slots
from megatron_periln.norms import (
    PLACEMENTS,
    EngineInputNorm,
    InputNorm,
    NoNorm,
    NormedBiasDropoutAdd,
    ScaledInputNorm,
    kernels,
)
from tests.models import small
from tests.models.test_hybrid import stateful

pytestmark = pytest.mark.usefixtures("single_process")

LAYERS, HIDDEN = 8, 64
STD = HIDDEN**-0.5  # weights that keep the size of what they multiply


@functools.cache
def squares(placement):
    """Return the stream's mean square after each layer, the mean of two seeds."""
    config = small.transformer_config(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=2 * HIDDEN,
        layernorm_epsilon=1e-12,
        init_method_std=STD,
        activation_func=F.relu,  # linear in the size of its input
    )
    measured = []
    for seed in range(2):
        small.seed(seed)
        model = GPTModelBuilder(small.model_config(config, placement)).build_model(small.groups())
        with torch.no_grad(), small.layer_outputs(model) as outputs:
            small.run(model)
        measured.append([output.square().mean().item() for output in outputs])
    return np.mean(measured, axis=0)


@pytest.mark.parametrize(("name", "bound"), [("scaled-peri", 0.2), ("gated-peri", 0.3)])
def test_a_stream_whose_weights_have_squares_of_sum_1_keeps_its_size(name, bound):
    """Terms of size 1, weighted by a and b and somewhat alike; without scales it grows by 2 a layer."""
    np.testing.assert_allclose(squares(name), 1, rtol=bound)
    np.testing.assert_allclose(squares("peri"), 1 + 2 * np.arange(1, LAYERS + 1), rtol=0.2)


def test_layernorm_scaling_divides_what_a_layer_adds_by_its_number():
    """Sun et al., section 4: with sublayers that are linear in the size of their input."""
    added = {name: np.diff(squares(name)) for name in ("pre", "ln-scaling")}
    layers = np.arange(2, LAYERS + 1)
    np.testing.assert_allclose(added["ln-scaling"] * layers / added["pre"], 1, rtol=0.25)


def test_the_stream_of_mix_ln_grows_from_where_its_norms_stand_before_the_sublayers():
    mixed = squares("mix-ln")
    np.testing.assert_allclose(mixed[: LAYERS // 4], 1, rtol=1e-4)
    grown = mixed[LAYERS // 4 :]
    assert all(np.diff(grown) > 0) and grown[0] > 1.05


def test_the_stream_of_hybrid_norm_starts_anew_in_each_layer():
    mine, pre = squares("hybrid-norm"), squares("pre")
    assert mine.max() / mine.min() < 1.1
    assert pre[-1] > pre[0] + 5 * (mine[-1] - mine[0])


@pytest.mark.parametrize("name", ["deepnorm", "keel"])
def test_norms_after_the_add_keep_the_stream_at_1(name):
    np.testing.assert_allclose(squares(name), 1, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "alpha"), [("post", 1), ("deepnorm", (2 * LAYERS) ** 0.25), ("keel", 2 * LAYERS)]
)
def test_what_a_stack_of_norms_after_the_add_passes_on_of_a_gradient(name, alpha):
    """A sublayer whose output has size 1 passes on alpha / sqrt(alpha^2 + 1): Post-LN's vanishes."""
    config = small.transformer_config(num_layers=LAYERS, hidden_size=512, layernorm_epsilon=1e-12)
    placement = PLACEMENTS[name]
    generator = torch.Generator().manual_seed(1)
    start, direction, *outputs = torch.randn(2 + 2 * LAYERS, 4, 1, 512, generator=generator)
    x = start.requires_grad_()
    for output, rule in zip(outputs, placement.rules(LAYERS), strict=True):
        add = NormedBiasDropoutAdd(config, placement, rule)
        add.set_scales(rule)
        x = add(True, False)((output, None), x, 0.0)
    x.backward(direction)
    passed_on = (start.grad.norm() / direction.norm()).item()
    assert passed_on == pytest.approx((1 + alpha**-2) ** -LAYERS, rel=0.1)


def test_deepnorm_starts_from_the_initial_weights_of_its_paper():
    """Values, output projections and MLPs at beta times the std of all others, whatever the depth."""
    beta = (8 * LAYERS) ** -0.25
    built = {}
    for name in ("deepnorm", "post"):
        config = small.transformer_config(num_layers=LAYERS, hidden_size=HIDDEN, num_query_groups=2)
        built[name] = small.build(name, config).decoder.layers[2]

    def weights(layer):
        qkv = layer.self_attention.linear_qkv.weight.view(2, 4, HIDDEN // 4, HIDDEN)
        others = (layer.self_attention.linear_proj, layer.mlp.linear_fc1, layer.mlp.linear_fc2)
        return [qkv[:, :2], qkv[:, 2], qkv[:, 3], *(other.weight for other in others)]

    deep = 1 / math.sqrt(2 * LAYERS)  # by which Megatron makes output projections smaller
    factors = (1, 1, beta, beta / deep, beta, beta / deep)
    for mine, stock, factor in zip(*map(weights, built.values()), factors, strict=True):
        torch.testing.assert_close(mine, stock * factor)


def test_deepnorm_refuses_layers_whose_initial_weights_it_does_not_know():
    config = small.transformer_config(num_moe_experts=2, moe_router_topk=2, **small.SWIGLU)
    config.moe_layer_freq = [1, 1]
    with pytest.raises(
        UsageError, match=r"'deepnorm': its initial weights are .* decoder\.layers\.0 has other"
    ):
        small.build("deepnorm", config)


def test_the_guard_sees_other_scales_and_another_layer_s_norms():
    model = small.build("scaled-peri")
    model.decoder.layers[1].mlp_bda.norm.residual_scale = 1.0
    with pytest.raises(UsageError, match=r"decoder\.layers\.1 .* of its mlp with other scales"):
        check_slots(model, PLACEMENTS["scaled-peri"])
    model = small.build("mix-ln", small.transformer_config(num_layers=4))
    check_slots(model, PLACEMENTS["mix-ln"])
    model.decoder.layers[1].layer_number = 1
    with pytest.raises(UsageError, match=r"decoder\.layers\.1 .* of its self_attention without the norm"):
        check_slots(model, PLACEMENTS["mix-ln"])


def test_a_layer_takes_the_rule_of_the_number_that_megatron_gives_it():
    """As on the second of two pipeline stages."""
    config = small.model_config(small.transformer_config(num_layers=8), "mix-ln")
    (layer, *_), transformer = placed_layer_spec(config).layer_specs, config.transformer
    assert layer.submodules.input_layernorm is NoNorm
    spec = placed_layer_spec(small.model_config(transformer, "pre"))
    second = place_norms(spec, PLACEMENTS["mix-ln"], transformer, first_layer=3).layer_specs[0]
    assert second.submodules.input_layernorm is spec.layer_specs[0].submodules.input_layernorm


def test_scaled_norms_stand_before_the_linears_of_transformer_engine(te_specs):
    placed = place_norms(te_specs(), PLACEMENTS["ln-scaling"], small.transformer_config()).submodules
    assert placed.input_layernorm is placed.pre_mlp_layernorm is ScaledInputNorm
    keys = placed.sharded_state_dict_keys_map
    assert keys["input_layernorm."] == "self_attention.linear_qkv.layer_norm_"
    assert keys["pre_mlp_layernorm."] == "mlp.linear_fc1.layer_norm_"
    model = small.build("ln-scaling")
    assert [layer.mlp_bda.__class__.__name__ for layer in model.decoder.layers] == ["function"] * 2
    assert model.decoder.layers[1].pre_mlp_layernorm.scale == pytest.approx(2**-0.5)


def test_a_scaled_stream_without_norms_after_the_sublayers():
    """What no named rule has: Pre-LN with other scales, as in a rule of one's own."""
    placement = PLACEMENTS["pre"].changed({"residual_scale": 0.5, "output_scale": 2.0})
    model, stock = small.build(placement), small.build("pre")
    x, residual = torch.randn(2, 3, 1, small.HIDDEN)
    layer = model.decoder.layers[0]
    out = layer.mlp_bda(True, False)((x, None), residual, 0.0)
    torch.testing.assert_close(out, 0.5 * residual + 2 * x)
    assert model.state_dict().keys() == stock.state_dict().keys()


def run_once(placement):
    model = small.perturb(small.build(placement))
    return model, small.gradients(model)


PERI, PRE = PLACEMENTS["peri"], PLACEMENTS["pre"]
HALF = PERI.changed({"residual_scale": "sqrt(3) / 2", "output_scale": 0.5})
LEARNED = {
    "gated-peri": (
        PLACEMENTS["gated-peri"],
        PERI.changed({"residual_scale": 0.75**0.5, "output_scale": 0.5}),
    ),
    "peri, scales": (PERI.changed({"learned": "scales"}), PERI),
    "gpas": (PLACEMENTS["gpas"], PRE),
}


@pytest.mark.parametrize(("rule", "start"), LEARNED.values(), ids=LEARNED)
def test_learned_scales_start_as_a_rule_without_them(rule, start):
    model, stock = small.build(rule), small.build(start)
    torch.testing.assert_close(small.run(model), small.run(stock))
    added = rule.num_parameters(2, small.HIDDEN) - start.num_parameters(2, small.HIDDEN)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in stock.parameters()) == added


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_of_learned_scales_have_the_same_bits_each_time(name):
    first, again = (run_once(LEARNED[name][0])[1] for _ in range(2))
    scales = [key for key in first if key.endswith(("residual_scale", "output_scale", "gate"))]
    assert len(scales) == (8 if name == "peri, scales" else 4)
    assert all(first[key].all() and torch.equal(first[key], again[key]) for key in scales)


def test_learned_scales_start_at_those_of_a_rule():
    rule = PLACEMENTS["scaled-peri"].changed({"learned": "scales"})
    scales = [bda.norm.residual_scale.item() for bda in adds(small.build(rule))]
    assert scales == pytest.approx([(k / (k + 1)) ** 0.5 for k in range(1, 5)])


def adds(model):
    return [bda for bda in model.modules() if isinstance(bda, NormedBiasDropoutAdd)]


def test_the_gradient_of_gpas_passes_the_scale_by():
    """Chen et al., equation 5: the stream is smaller, and its gradient is not."""
    x = torch.randn(3, 4, requires_grad=True)
    gate = torch.full((1,), 0.8, requires_grad=True)
    out, gradient = kernels.gpas(x, gate), torch.randn(3, 4)
    out.backward(gradient)
    torch.testing.assert_close(out, (1 - F.silu(gate)) * x)
    assert torch.equal(x.grad, gradient)
    slope = torch.autograd.functional.jacobian(F.silu, gate.detach()).view(1)
    torch.testing.assert_close(gate.grad, -slope * (gradient * x).sum())


@pytest.mark.parametrize("name", ["norm_add", "add_norm", "add"])
def test_learned_scales_are_computed_as_constants_are(name):
    generator = torch.Generator().manual_seed(1)
    x, residual = torch.randn(2, 5, 1, 16, generator=generator)
    weight = torch.rand(16, generator=generator)
    norm = () if name == "add" else (weight, None, 1e-5, False)
    function = getattr(kernels, name)
    learned = [torch.full((1,), value, dtype=torch.float64, requires_grad=True) for value in (0.7, -1.3)]
    given = (x.double(), None, residual.double(), *norm, 0.0, True)
    out = function(*given, *learned)
    torch.testing.assert_close(out, function(*given, 0.7, -1.3))
    assert torch.autograd.gradcheck(lambda *scales: function(*given, *scales), learned)


@pytest.mark.parametrize("name", ["gated-peri", "peri, scales"])
def test_the_triton_kernels_compute_learned_scales(name, monkeypatch):
    """In a model, and give what plain PyTorch gives."""
    from megatron_periln.norms.kernels import fused  # imports Triton

    calls, norm_add = [], fused.norm_add
    monkeypatch.setattr(fused, "norm_add", lambda *arguments: calls.append(1) or norm_add(*arguments))
    kernels.choose_backend.cache_clear()
    model, expected = run_once(LEARNED[name][0])
    kernels.use_backend("triton")
    try:
        gradients = small.gradients(model)
    finally:
        kernels.use_backend("auto")
        kernels.choose_backend.cache_clear()
    assert len(calls) == 4
    assert max(small.relative_error(gradients[key], expected[key]) for key in expected) < 1e-5


OTHER_LAYERS = {
    "experts": (
        TransformerConfig,
        {"num_moe_experts": 2, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"},
    ),
    "latent attention": (
        MLATransformerConfig,
        {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
        | {"multi_latent_attention": True, "rope_type": "rope"},
    ),
}


@pytest.mark.parametrize("layers", OTHER_LAYERS)
@pytest.mark.parametrize("name", sorted(set(small.RULES) - {"deepnorm"}))
def test_other_layers_have_the_rules_too(name, layers):
    """The builder looks at each residual add; here every one of them is called, and trains."""
    config_class, changes = OTHER_LAYERS[layers]
    config = small.transformer_config(config_class, num_layers=4, **small.SWIGLU, **changes)
    model = small.build(name, config)
    gradients = small.gradients(model)
    check_calls(model)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


WITHOUT = {"norms": {"output": {"weight": False}, "input": {"zero_centered": True, "epsilon": 0.1}}}


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_a_norm_without_weights_is_no_parameter_and_is_not_saved(normalization):
    config = small.transformer_config(normalization=normalization)
    model, peri = small.build(PERI.changed(WITHOUT), config), small.build("peri", config)
    gone = {name for name in peri.state_dict() if "_bda.norm." in name}
    assert model.state_dict().keys() == peri.state_dict().keys() - gone and gone
    count = sum(parameter.numel() for parameter in model.parameters())
    less = [rule.num_parameters(2, small.HIDDEN, normalization) for rule in (PERI, PERI.changed(WITHOUT))]
    assert sum(parameter.numel() for parameter in peri.parameters()) - count == less[0] - less[1]
    norm = model.decoder.layers[0].input_layernorm
    assert norm.eps == 0.1 and not norm.weight.any()
    norm = model.decoder.layers[0].mlp_bda.norm
    norm.weight.zero_()
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(small.HIDDEN)) and "no weights" in repr(norm)


def test_weights_that_are_not_there_are_as_weights_of_1():
    """With each backend that runs here, and with zero-centered weights everywhere else."""
    settings = {"norms": {"output": {"weight": False}, "embedding": {"weight": False}}}
    config = small.transformer_config(layernorm_zero_centered_gamma=True)
    peri = small.build("peri", config)
    expected = small.gradients(peri)
    for backend, fuse in (("torch", False), ("torch", True), ("triton", False), ("triton", True)):
        kernels.use_backend(backend)
        try:
            model = small.build(PERI.changed(settings), config, fuse_pre_mlp_norm=fuse)
            found = small.gradients(model)
        finally:
            kernels.use_backend("auto")
        assert found.keys() < expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], msg=f"{backend} {fuse} {name}")


def test_input_norms_of_their_own_stand_before_the_linears_of_transformer_engine(te_specs):
    """And are saved as those in the linears are."""
    config = small.transformer_config()
    placed = place_norms(te_specs(), PERI.changed(WITHOUT), config).submodules
    norms = [placed.input_layernorm, placed.pre_mlp_layernorm]
    assert [(norm.func, norm.keywords["settings"].epsilon) for norm in norms] == [(InputNorm, 0.1)] * 2
    assert placed.self_attention.submodules.linear_qkv is te.TEColumnParallelLinear
    assert get_submodules(placed.mlp).linear_fc1 is te.TEColumnParallelLinear
    keys = placed.sharded_state_dict_keys_map
    assert keys["input_layernorm."] == "self_attention.linear_qkv.layer_norm_"
    assert keys["pre_mlp_layernorm."] == "mlp.linear_fc1.layer_norm_"
    final = PERI.changed({"norms": {"final": {"epsilon": 0.2}}})
    for norm, ours in ((te.TENorm, EngineInputNorm), (InputNorm, InputNorm)):
        block = TransformerBlockSubmodules(layer_specs=[te_specs()], layer_norm=norm)
        block = place_norms(block, final, config)
        assert block.layer_norm.func is ours
        assert block.layer_norm(config, hidden_size=8, eps=1e-5).eps == 0.2
    config.fused_residual_rmsnorm = True
    with pytest.raises(ValueError, match="--fused-residual-rmsnorm computes input norms without a scale"):
        place_norms(te_specs(), PERI.changed(WITHOUT), config)


@pytest.mark.parametrize("symbol", ["M", "G"])
def test_layers_of_hybrid_models_have_such_norms_too(symbol):
    final = {"final": {"weight": False, "epsilon": 0.2}}
    model = stateful("peri", symbol, changed={"norms": {**WITHOUT["norms"], **final}})
    state, sublayer = model.sharded_state_dict(), {"M": "mixer", "G": "self_attention"}[symbol]
    keys = {tensor.key for name, tensor in state.items() if name.startswith("decoder.layers.0.")}
    assert f"decoder.layers.0.{sublayer}.in_proj.layer_norm_weight" in keys
    assert not any("_bda" in key for key in keys)
    assert not any("final_norm" in name for name in state) and model.decoder.final_norm.eps == 0.2
    layer = model.decoder.layers[0]
    norm = layer.norm if symbol == "M" else layer.input_layernorm
    assert norm.eps == 0.1 and norm.zero_centered_gamma
    assert all(gradient.isfinite().all() for gradient in small.gradients(model).values())
