"""The modules in Megatron's bias-dropout-add slots, called as Megatron calls them."""

import copy

import pytest
import torch

from megatron_periln.norms import OUTPUT, PERI, AddNorm, OutputNormAdd, ResidualNorm
from megatron_periln.norms.modules import Norm
from tests.norms import formulas
from tests.norms.test_modules import config, gammas, kinds, perturbed

slots = pytest.mark.parametrize("slot_class", [OutputNormAdd, AddNorm])


def build(slot_class, settings=None, **options):
    settings = settings or config()
    return (
        OutputNormAdd(settings, PERI.with_options(**options))
        if slot_class is OutputNormAdd
        else AddNorm(settings)
    )


def join(slot, branch, bias, residual, dropout=0.0, training=True, fused=False):
    return slot(training, fused)((branch, bias), residual, dropout)


def formula(slot, branch, bias, residual, eps):
    function = formulas.norm_add if isinstance(slot, OutputNormAdd) else formulas.add_norm
    norm = slot.norm
    return function(branch, bias, residual, norm.weight, norm.bias, eps, norm.zero_centered_gamma)


@slots
@kinds
@gammas
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_slot_joins_branch_and_residual_by_its_formula(
    slot_class, normalization, zero_centered_gamma, bias, fused
):
    slot = build(slot_class, config(normalization, zero_centered_gamma, layernorm_epsilon=0.1))
    perturbed(slot.norm)
    branch, linear_bias, residual, _, _ = formulas.inputs(bias=bias)
    result = join(slot, branch, linear_bias, residual, fused=fused)
    torch.testing.assert_close(result, formula(slot, branch, linear_bias, residual, eps=0.1).float())


@kinds
def test_the_output_norm_comes_after_the_bias(normalization):
    slot = build(OutputNormAdd, config(normalization))
    branch, bias, residual, _, _ = formulas.inputs()
    result = join(slot, branch, bias, residual)
    too_early = join(slot, branch, None, residual) + bias
    assert (result - too_early).abs().max() > 1
    normed = (result - residual).double()
    torch.testing.assert_close(
        normed.square().mean(-1), torch.ones(normed.shape[:-1]).double(), rtol=1e-4, atol=1e-4
    )


@slots
@kinds
def test_eps_is_the_configs_and_never_a_default(slot_class, normalization):
    slot = build(slot_class, config(normalization, layernorm_epsilon=0.1))
    branch, bias, residual, _, _ = formulas.inputs()
    branch, bias, residual = 0.1 * branch, 0.1 * bias, 0.1 * residual
    result = join(slot, branch, bias, residual)
    torch.testing.assert_close(result, formula(slot, branch, bias, residual, eps=0.1).float())
    for default in (1e-5, 1e-6):
        assert (result - formula(slot, branch, bias, residual, eps=default)).abs().max() > 0.1


@kinds
def test_the_output_norms_own_eps_takes_precedence(normalization):
    slot = build(OutputNormAdd, config(normalization, layernorm_epsilon=1e-5), output_norm_epsilon=0.1)
    branch, bias, residual, _, _ = formulas.inputs(bias=False)
    result = join(slot, branch, bias, residual)
    torch.testing.assert_close(result, formula(slot, branch, bias, residual, eps=0.1).float())
    assert (result - formula(slot, branch, bias, residual, eps=1e-5)).abs().max() > 0.05


@kinds
@gammas
@pytest.mark.parametrize("placement", [PERI, OUTPUT], ids=lambda placement: placement.name)
def test_depth_scaled_gains_start_at_one_over_the_root_of_the_layers(
    normalization, zero_centered_gamma, placement
):
    settings = config(normalization, zero_centered_gamma)
    slot = OutputNormAdd(settings, placement.with_options(output_norm_init="depth-scaled"))
    assert settings.num_layers == 4
    assert set(slot.norm.weight.tolist()) == {0.5 - zero_centered_gamma}
    branch, _, residual, _, _ = formulas.inputs()
    ones = OutputNormAdd(settings, placement)
    added, plain = (join(module, branch, None, residual) - residual for module in (slot, ones))
    torch.testing.assert_close(added, 0.5 * plain, rtol=1e-4, atol=1e-5)


@kinds
def test_frozen_output_gains_get_no_gradient_and_pass_it_on(normalization):
    branch, bias, residual, _, _ = formulas.inputs()
    for frozen in (False, True):
        slot = build(OutputNormAdd, config(normalization), freeze_output_norm=frozen)
        inputs = [tensor.clone().requires_grad_() for tensor in (branch, bias, residual)]
        join(slot, *inputs).square().sum().backward()
        assert all(tensor.grad.any() for tensor in inputs)
        assert all((parameter.grad is None) == frozen for parameter in slot.parameters())
        assert all(parameter.requires_grad != frozen for parameter in slot.parameters())


@slots
@kinds
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_parameter_is_tagged_for_sequence_parallelism(slot_class, normalization, sequence_parallel):
    settings = config(
        normalization, sequence_parallel=sequence_parallel, tensor_model_parallel_size=1 + sequence_parallel
    )
    tags = {name: p.sequence_parallel for name, p in build(slot_class, settings).named_parameters()}
    names = ["norm.weight"] + ["norm.bias"] * (normalization == "LayerNorm")
    assert tags == dict.fromkeys(names, sequence_parallel)


@slots
def test_dropout_follows_the_call_and_not_the_modules_mode(slot_class):
    slot = build(slot_class)
    tensors = formulas.inputs()[:3]
    evaluated = join(slot.train(), *tensors, dropout=0.5, training=False)
    assert torch.equal(evaluated, join(slot.eval(), *tensors, training=True))
    assert not torch.equal(evaluated, join(slot.eval(), *tensors, dropout=0.5, training=True))


@slots
@pytest.mark.parametrize("training", [False, True])
def test_branch_bias_and_residual_are_left_as_they_were(slot_class, training):
    slot = build(slot_class, config(params_dtype=torch.bfloat16))
    tensors = formulas.inputs(dtype=torch.bfloat16)[:3]
    copies = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        join(slot, *tensors, dropout=0.1, training=training)
    assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))
    assert [tensor._version for tensor in tensors] == [0, 0, 0]


@slots
def test_a_bf16_branch_joins_an_fp32_stream_in_fp32(slot_class):
    slot = build(slot_class, config(params_dtype=torch.bfloat16))
    perturbed(slot.norm)
    branch, bias, _, _, _ = formulas.inputs(dtype=torch.bfloat16)
    residual = formulas.inputs()[2]
    result = join(slot, branch, bias, residual)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, formula(slot, branch, bias, residual, slot.norm.eps).float())


@slots
def test_a_copy_joins_with_its_own_parameters(slot_class):
    slot = build(slot_class)
    tensors = formulas.inputs()[:3]
    before = join(slot, *tensors)
    perturbed(copy.deepcopy(slot).norm)
    assert torch.equal(before, join(slot, *tensors))


def test_a_slot_without_a_formula_says_so():
    with pytest.raises(NotImplementedError):
        join(ResidualNorm(Norm(config())), *formulas.inputs()[:3])
