import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_periln.norms import InputNorm, NoNorm, Norm
from tests.norms import formulas

HIDDEN = 48
kinds = pytest.mark.parametrize("normalization", formulas.NORMALIZATIONS)
gammas = pytest.mark.parametrize("zero_centered_gamma", [False, True])


def config(normalization="RMSNorm", zero_centered_gamma=False, **changes):
    return TransformerConfig(
        num_layers=4,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        normalization=normalization,
        layernorm_zero_centered_gamma=zero_centered_gamma,
        **changes,
    )


def perturbed(norm):
    _, _, _, weight, bias = formulas.inputs()
    with torch.no_grad():
        norm.weight.copy_(weight)
        if norm.bias is not None:
            norm.bias.copy_(bias)
    return norm


def formula(norm, x, eps):
    return formulas.norm(x, norm.weight, norm.bias, eps, norm.zero_centered_gamma)


@kinds
@gammas
@pytest.mark.parametrize("norm_class", [Norm, InputNorm])
def test_a_norm_is_the_formula(norm_class, normalization, zero_centered_gamma):
    norm = perturbed(norm_class(config(normalization, zero_centered_gamma, layernorm_epsilon=0.1)))
    x = formulas.inputs()[0].requires_grad_()
    torch.testing.assert_close(norm(x), formula(norm, x, eps=0.1).float())
    assert (norm(x) - formula(norm, x, eps=1e-5)).abs().max() > 0.01
    gradient = torch.autograd.grad(norm(x).square().sum(), [x, *norm.parameters()])
    expected = torch.autograd.grad(formula(norm, x, eps=0.1).square().sum(), [x, *norm.parameters()])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@kinds
def test_a_given_eps_and_size_take_precedence(normalization):
    norm = perturbed(Norm(config(normalization), eps=0.3))
    x = formulas.inputs()[0]
    torch.testing.assert_close(norm(x), formula(norm, x, eps=0.3).float())
    assert Norm(config(normalization), hidden_size=7)(torch.randn(3, 7)).shape == (3, 7)


@kinds
@gammas
@pytest.mark.parametrize("initial_weight", [1.0, 0.25])
def test_the_initial_weight_is_the_factor_whatever_is_stored(
    normalization, zero_centered_gamma, initial_weight
):
    norm = Norm(config(normalization, zero_centered_gamma), initial_weight=initial_weight)
    assert set(norm.weight.tolist()) == {initial_weight - zero_centered_gamma}
    one = torch.ones(HIDDEN)
    x = formulas.inputs()[0]
    expected = initial_weight * formulas.norm(x, one, None if norm.bias is None else 0 * one, norm.eps)
    torch.testing.assert_close(norm(x), expected.float())


@kinds
@gammas
def test_a_norm_made_on_the_meta_device_starts_alike(normalization, zero_centered_gamma):
    """As Megatron-FSDP does it: empty memory, then the module's ``reset_parameters``."""
    with torch.device("meta"):
        late = Norm(config(normalization, zero_centered_gamma), initial_weight=0.25)
    late.to_empty(device="cpu")
    for parameter in late.parameters():
        parameter.data.fill_(7)
    late.reset_parameters()
    now = Norm(config(normalization, zero_centered_gamma), initial_weight=0.25)
    for mine, theirs in zip(late.parameters(), now.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@kinds
def test_a_frozen_norm_passes_gradients_on_and_keeps_none(normalization):
    norm = Norm(config(normalization), trainable=False)
    x = formulas.inputs()[0].requires_grad_()
    norm(x).square().sum().backward()
    assert x.grad.any()
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in norm.parameters())


@kinds
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_parameter_is_tagged_for_sequence_parallelism(normalization, sequence_parallel):
    settings = config(
        normalization, sequence_parallel=sequence_parallel, tensor_model_parallel_size=1 + sequence_parallel
    )
    parameters = list(Norm(settings).parameters())
    assert len(parameters) == 1 + (normalization == "LayerNorm")
    assert [parameter.sequence_parallel for parameter in parameters] == [sequence_parallel] * len(parameters)


@kinds
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_norm_keeps_its_inputs_dtype_and_an_input_norm_gives_the_weights(normalization, stream, weights):
    settings = config(normalization, params_dtype=weights)
    x = formulas.inputs(dtype=stream)[0]
    for norm, dtype in ((Norm(settings), stream), (InputNorm(settings), weights)):
        assert {parameter.dtype for parameter in norm.parameters()} == {weights}
        result = perturbed(norm)(x)
        assert result.dtype == dtype
        torch.testing.assert_close(result, formula(norm, x, norm.eps).to(dtype))


def test_no_norm_casts_and_changes_nothing_else():
    no_norm = NoNorm(config=config(params_dtype=torch.bfloat16), hidden_size=HIDDEN, eps=1e-5)
    x = formulas.inputs()[0]
    assert torch.equal(no_norm(x), x.bfloat16())
    assert no_norm(x.bfloat16()).dtype == torch.bfloat16
    assert not list(no_norm.parameters())
    assert isinstance(no_norm, IdentityOp)  # Megatron does not recompute an IdentityOp


@kinds
@gammas
def test_gradients_are_those_of_finite_differences(normalization, zero_centered_gamma):
    norm = Norm(config(normalization, zero_centered_gamma, params_dtype=torch.float64), hidden_size=5)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in norm.named_parameters()]
    values = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in names]

    def call(x, *values):
        return torch.func.functional_call(norm, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *values))


def test_another_kind_of_norm_is_refused():
    with pytest.raises(ValueError, match="RMSNorm or LayerNorm for this norm, not 'L2Norm'"):
        Norm(config("L2Norm"))


@kinds
def test_printing_a_norm_tells_its_kind_size_and_eps(normalization):
    assert f"{normalization}, 48, eps=0.1, zero_centered_gamma=True" in repr(
        Norm(config(normalization, True, layernorm_epsilon=0.1))
    )
