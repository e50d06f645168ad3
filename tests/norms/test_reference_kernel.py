"""The reference kernels against fp64 formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_periln.norms.kernels import reference
from tests.norms import formulas

EPS = 0.1
ULP = 2.0**-8  # of bf16: an upper bound of the relative distance of neighbours

kinds = pytest.mark.parametrize("layer_norm", [False, True], ids=["RMSNorm", "LayerNorm"])
gammas = pytest.mark.parametrize("zero_centered_gamma", [False, True], ids=["gamma", "zero-centered"])
biases = pytest.mark.parametrize("sublayer_bias", [False, True], ids=["no-bias", "bias"])
kernels = pytest.mark.parametrize("name", ["norm_add", "add_norm"])


def call(name, tensors, zero_centered_gamma=False, dropout=0.0, training=True):
    return getattr(reference, name)(*tensors, EPS, zero_centered_gamma, dropout, training)


def expected(name, tensors, zero_centered_gamma=False, **options):
    return getattr(formulas, name)(*tensors, EPS, zero_centered_gamma, **options)


def dropout_mask(like, p, seed):
    torch.manual_seed(seed)
    return F.dropout(torch.ones_like(like), p)


@kinds
@gammas
def test_norm_is_the_formula_in_the_compute_dtype(layer_norm, zero_centered_gamma):
    for dtype, compute_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        x, _, _, weight, bias = formulas.inputs(layer_norm=layer_norm, dtype=dtype)
        result = reference.norm(x, weight, bias, EPS, zero_centered_gamma)
        assert result.dtype == compute_dtype
        torch.testing.assert_close(
            result, formulas.norm(x, weight, bias, EPS, zero_centered_gamma).to(compute_dtype)
        )


@kernels
@kinds
@gammas
@biases
def test_values_and_gradients_are_those_of_the_formula(name, layer_norm, zero_centered_gamma, sublayer_bias):
    tensors = formulas.inputs(sublayer_bias=sublayer_bias, layer_norm=layer_norm)
    given = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
    ours = call(name, tensors, zero_centered_gamma)
    theirs = expected(name, tensors, zero_centered_gamma)
    torch.testing.assert_close(ours, theirs.float())
    gradients = (torch.autograd.grad(result.sin().sum(), given) for result in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@kernels
@kinds
@biases
def test_gradients_are_those_of_finite_differences(name, layer_norm, sublayer_bias):
    tensors = formulas.inputs(
        sublayer_bias=sublayer_bias, layer_norm=layer_norm, dtype=torch.float64, hidden=5, rows=(2, 3)
    )
    given = [tensor.requires_grad_() for tensor in tensors if tensor is not None]

    def function(*values):
        values = iter(values)
        return call(name, [None if tensor is None else next(values) for tensor in tensors])

    assert torch.autograd.gradcheck(function, given)


def distance_in_ulps(actual, exact):
    """Return the largest distance of ``actual`` from the rounded ``exact``, in bf16's neighbours."""
    actual, rounded = (tensor.bfloat16().view(torch.int16).int() for tensor in (actual, exact))
    ordered = [torch.where(bits < 0, -(bits & 0x7FFF), bits) for bits in (actual, rounded)]
    return (ordered[0] - ordered[1]).abs()


@kernels
@kinds
@biases
def test_bf16_is_rounded_once(name, layer_norm, sublayer_bias):
    tensors = formulas.inputs(
        sublayer_bias=sublayer_bias, layer_norm=layer_norm, dtype=torch.bfloat16, rows=(64, 4)
    )
    result, exact = call(name, tensors), expected(name, tensors)
    assert result.dtype == torch.bfloat16
    distance = distance_in_ulps(result, exact)
    assert distance.max() <= 1
    assert distance.count_nonzero() < 0.01 * distance.numel()


@kinds
def test_rounding_the_norm_before_the_add_would_show(layer_norm):
    tensors = formulas.inputs(sublayer_bias=False, layer_norm=layer_norm, dtype=torch.bfloat16, rows=(64, 4))
    sublayer_output, _, residual, weight, bias = tensors
    twice = residual + reference.norm(sublayer_output, weight, bias, EPS, False).bfloat16()
    distance = distance_in_ulps(twice, expected("norm_add", tensors))
    assert distance.max() > 1
    assert distance.count_nonzero() > 0.1 * distance.numel()


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_the_result_has_the_residuals_dtype(name, dtype, residual):
    tensors = formulas.inputs(dtype=dtype)
    tensors[2] = tensors[2].to(residual)
    result = call(name, tensors)
    assert result.dtype == residual
    torch.testing.assert_close(result, expected(name, tensors).to(residual))


@kernels
@biases
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_in_place(name, sublayer_bias, training, grad, dropout, dtype):
    tensors = formulas.inputs(sublayer_bias=sublayer_bias, dtype=dtype)
    given = [tensor for tensor in tensors if tensor is not None]
    copies = [tensor.clone() for tensor in given]
    with torch.set_grad_enabled(grad):
        result = call(name, tensors, dropout=dropout, training=training)
    assert all(torch.equal(*pair) for pair in zip(given, copies, strict=True))
    assert [tensor._version for tensor in given] == [0] * len(given)
    assert result.data_ptr() not in [tensor.data_ptr() for tensor in given]


@kernels
def test_without_dropout_training_and_evaluation_agree(name):
    tensors = formulas.inputs()
    trained, evaluated = (call(name, tensors, training=training) for training in (True, False))
    assert torch.equal(trained, evaluated)
    assert torch.equal(evaluated, call(name, tensors, dropout=0.5, training=False))


@kernels
def test_the_same_seed_replays_the_same_dropout(name):
    tensors = formulas.inputs()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(call(name, tensors, dropout=0.4))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@kernels
@biases
@kinds
def test_dropout_acts_after_the_norm_of_an_output_and_before_a_norm_after_the_add(
    name, sublayer_bias, layer_norm
):
    tensors, p = formulas.inputs(sublayer_bias=sublayer_bias, layer_norm=layer_norm), 0.4
    mask = dropout_mask(tensors[0], p, seed=9)
    torch.manual_seed(9)
    result = call(name, tensors, dropout=p)
    torch.testing.assert_close(result, expected(name, tensors, mask=mask).float())
    sublayer_output, given_bias, residual, weight, bias = tensors
    parameters = (weight, bias, EPS)
    dropped = mask * formulas.biased(sublayer_output, given_bias)
    other_order = {
        "norm_add": residual + formulas.norm(dropped, *parameters),
        "add_norm": mask * formulas.add_norm(*tensors, EPS),
    }[name]
    assert (result - other_order).abs().max() > 0.1


def test_dropout_keeps_the_right_share_and_scales_it_up():
    tensors, p = formulas.inputs(rows=(200, 10), layer_norm=False), 0.3
    torch.manual_seed(4)
    residual = tensors[2]
    added = call("norm_add", tensors, dropout=p) - residual
    whole = expected("norm_add", tensors) - residual
    kept = (added != 0).double().mean()
    deviation = (p * (1 - p) / added.numel()) ** 0.5
    assert abs(kept - (1 - p)) < 5 * deviation
    torch.testing.assert_close(added[added != 0], (whole / (1 - p))[added != 0].float(), rtol=1e-4, atol=1e-5)


class RandomNumbers(TorchDispatchMode):
    """Collects the dtypes of what random numbers are drawn in, or for."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in function.tags:
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["norm_add", "add_norm", "norm_add_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout_draws_in_fp32(name, dtype):
    """Compiled, ``rand`` of bf16 is 1 for one element in 512; as it is rounded, so is the probability."""
    tensors = formulas.inputs(layer_norm=True, dtype=dtype)
    following = (*tensors[3:], EPS, dtype) if name == "norm_add_norm" else ()
    with RandomNumbers() as drawn:
        getattr(reference, name)(*tensors, EPS, False, 0.3, True, *following)
    assert drawn.dtypes == {torch.float32}
    with RandomNumbers() as drawn:
        F.dropout(tensors[0], 0.3)
    assert drawn.dtypes == {dtype}
