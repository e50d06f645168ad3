"""The modules that stand for Megatron's bias-dropout-add, called as Megatron calls them."""

import copy

import pytest
import torch

from megatron_periln.norms import (
    OUTPUT,
    PERI,
    POST,
    FusedInputNorm,
    NormedBiasDropoutAdd,
    OutputNorm,
    kernels,
)
from tests.norms import formulas
from tests.norms.test_modules import config, gammas, kinds, perturbed

placements = pytest.mark.parametrize("placement", [PERI, POST], ids=lambda placement: placement.name)


def build(placement=PERI, settings=None, **options):
    return NormedBiasDropoutAdd(settings or config(), placement.with_options(**options))


def add(bda, sublayer_output, sublayer_bias, residual, dropout=0.0, training=True, fused=False):
    return bda(training, fused)((sublayer_output, sublayer_bias), residual, dropout)


def formula(bda, sublayer_output, sublayer_bias, residual, eps):
    norm = bda.norm
    function = formulas.norm_add if isinstance(norm, OutputNorm) else formulas.add_norm
    parameters = (norm.weight, norm.bias, eps, norm.zero_centered_gamma)
    return function(sublayer_output, sublayer_bias, residual, *parameters)


@placements
@kinds
@gammas
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_output_and_residual_are_added_by_the_formula(
    placement, normalization, zero_centered_gamma, bias, fused
):
    bda = build(placement, config(normalization, zero_centered_gamma, layernorm_epsilon=0.1))
    perturbed(bda.norm)
    tensors = formulas.inputs(sublayer_bias=bias)[:3]
    torch.testing.assert_close(add(bda, *tensors, fused=fused), formula(bda, *tensors, eps=0.1).float())


@kinds
def test_the_output_norm_comes_after_the_bias(normalization):
    bda = build(PERI, config(normalization))
    output, bias, residual, _, _ = formulas.inputs()
    result = add(bda, output, bias, residual)
    too_early = add(bda, output, None, residual) + bias
    assert (result - too_early).abs().max() > 1
    normed = (result - residual).double()
    torch.testing.assert_close(
        normed.square().mean(-1), torch.ones(normed.shape[:-1]).double(), rtol=1e-4, atol=1e-4
    )


@placements
@kinds
def test_eps_is_the_configs_and_never_a_default(placement, normalization):
    bda = build(placement, config(normalization, layernorm_epsilon=0.1))
    tensors = [0.1 * tensor for tensor in formulas.inputs()[:3]]
    result = add(bda, *tensors)
    torch.testing.assert_close(result, formula(bda, *tensors, eps=0.1).float())
    for default in (1e-5, 1e-6):
        assert (result - formula(bda, *tensors, eps=default)).abs().max() > 0.1


@kinds
def test_the_output_norms_own_eps_takes_precedence(normalization):
    bda = build(PERI, config(normalization, layernorm_epsilon=1e-5), output_norm_epsilon=0.1)
    tensors = formulas.inputs(sublayer_bias=False)[:3]
    result = add(bda, *tensors)
    torch.testing.assert_close(result, formula(bda, *tensors, eps=0.1).float())
    assert (result - formula(bda, *tensors, eps=1e-5)).abs().max() > 0.05


@kinds
@gammas
@pytest.mark.parametrize("placement", [PERI, OUTPUT], ids=lambda placement: placement.name)
def test_depth_scaled_weights_start_at_one_over_the_root_of_the_layers(
    normalization, zero_centered_gamma, placement
):
    settings = config(normalization, zero_centered_gamma)
    scaled, ones = (build(placement, settings, output_norm_init=init) for init in ("depth-scaled", "ones"))
    assert settings.num_layers == 4
    assert set(scaled.norm.weight.tolist()) == {0.5 - zero_centered_gamma}
    output, _, residual, _, _ = formulas.inputs()
    added, plain = (add(bda, output, None, residual) - residual for bda in (scaled, ones))
    torch.testing.assert_close(added, 0.5 * plain, rtol=1e-4, atol=1e-5)


@kinds
def test_frozen_output_norms_get_no_gradient_and_pass_it_on(normalization):
    for frozen in (False, True):
        bda = build(PERI, config(normalization), freeze_output_norm=frozen)
        inputs = [tensor.clone().requires_grad_() for tensor in formulas.inputs()[:3]]
        add(bda, *inputs).square().sum().backward()
        assert all(tensor.grad.any() for tensor in inputs)
        assert all((parameter.grad is None) == frozen for parameter in bda.parameters())
        assert all(parameter.requires_grad != frozen for parameter in bda.parameters())


@placements
@kinds
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_parameter_is_tagged_for_sequence_parallelism(placement, normalization, sequence_parallel):
    settings = config(
        normalization, sequence_parallel=sequence_parallel, tensor_model_parallel_size=1 + sequence_parallel
    )
    tags = {name: p.sequence_parallel for name, p in build(placement, settings).named_parameters()}
    names = ["norm.weight"] + ["norm.bias"] * (normalization == "LayerNorm")
    assert tags == dict.fromkeys(names, sequence_parallel)


@placements
def test_dropout_follows_the_call_and_not_the_modules_mode(placement):
    bda = build(placement)
    tensors = formulas.inputs()[:3]
    evaluated = add(bda.train(), *tensors, dropout=0.5, training=False)
    assert torch.equal(evaluated, add(bda.eval(), *tensors, training=True))
    assert not torch.equal(evaluated, add(bda.eval(), *tensors, dropout=0.5, training=True))


@placements
@pytest.mark.parametrize("training", [False, True])
def test_output_bias_and_residual_are_left_as_they_were(placement, training):
    bda = build(placement, config(params_dtype=torch.bfloat16))
    tensors = formulas.inputs(dtype=torch.bfloat16)[:3]
    copies = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        add(bda, *tensors, dropout=0.1, training=training)
    assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))
    assert [tensor._version for tensor in tensors] == [0, 0, 0]


@placements
def test_a_bf16_output_is_added_to_an_fp32_stream_in_fp32(placement):
    bda = build(placement, config(params_dtype=torch.bfloat16))
    perturbed(bda.norm)
    output, bias, _, _, _ = formulas.inputs(dtype=torch.bfloat16)
    residual = formulas.inputs()[2]
    result = add(bda, output, bias, residual)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, formula(bda, output, bias, residual, bda.norm.eps).float())


@placements
def test_a_copy_has_its_own_parameters(placement):
    bda = build(placement)
    tensors = formulas.inputs()[:3]
    before = add(bda, *tensors)
    perturbed(copy.deepcopy(bda).norm)
    assert torch.equal(before, add(bda, *tensors))


def with_next_norm():
    """Return a part of a layer: a bias-dropout-add, and the input norm that it computes as well."""
    layer = torch.nn.ModuleDict({"self_attn_bda": build(), "pre_mlp_layernorm": FusedInputNorm(config())})
    layer.self_attn_bda.norm.compute_next(layer.pre_mlp_layernorm)
    return layer


def test_the_next_norm_stays_the_layers_module():
    layer = with_next_norm()
    assert list(layer.state_dict()) == ["self_attn_bda.norm.weight", "pre_mlp_layernorm.weight"]
    assert list(layer.self_attn_bda.state_dict()) == ["norm.weight"]
    twin = copy.deepcopy(layer)
    assert twin.self_attn_bda.norm.next_norm is twin.pre_mlp_layernorm is not layer.pre_mlp_layernorm


def test_the_next_norm_is_that_of_the_sum_and_of_no_other_tensor():
    layer = with_next_norm()
    tensors = formulas.inputs()[:3]
    alone = add(build(), *tensors)
    result = add(layer.self_attn_bda, *tensors)
    assert torch.equal(result, alone)
    expected = formulas.norm(result, torch.ones(48), None, 1e-5).float()
    torch.testing.assert_close(layer.pre_mlp_layernorm(result), expected)
    add(layer.self_attn_bda, *tensors)
    other = 2 * result.flip(0)
    torch.testing.assert_close(
        layer.pre_mlp_layernorm(other), formulas.norm(other, torch.ones(48), None, 1e-5).float()
    )


def test_both_norms_are_being_called_while_their_kernel_runs(monkeypatch):
    """So hooks that gather parameters before a call, and free them after it, do so at the right time."""
    layer, events = with_next_norm(), []
    for name, norm in (("output", layer.self_attn_bda.norm), ("next", layer.pre_mlp_layernorm)):
        norm.register_forward_pre_hook(lambda *_, name=name: events.append(f"before {name}"))
        norm.register_forward_hook(lambda *_, name=name: events.append(f"after {name}"))
    kernel = kernels.norm_add_norm
    monkeypatch.setattr(kernels, "norm_add_norm", lambda *args: events.append("kernel") or kernel(*args))
    add(layer.self_attn_bda, *formulas.inputs()[:3])
    assert events == ["before output", "before next", "kernel", "after next", "after output"]
