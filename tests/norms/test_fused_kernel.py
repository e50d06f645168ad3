"""The fused Triton kernel next to fp64 formulas: interpreted on the CPU, compiled on a GPU."""

import pytest
import torch

from megatron_periln.norms.kernels import fused, plans, reference
from megatron_periln.norms.kernels.launch_config import (
    MAX_NORM_ADD_HIDDEN_SIZE,
    LaunchConfig,
    choose_launch_config,
)
from tests.norms import kernel_cases as cases
from tests.norms.kernel_cases import DEVICE, GRID, Case, evaluate, exact, worst_in_roundings

CONFIGS = {
    "whole rows": LaunchConfig(block=128, tile_rows=2, num_warps=1, programs_per_sm=1),
    # As long rows are read.
    "rows in parts": LaunchConfig(block=32, tile_rows=1, num_warps=1, programs_per_sm=1),
}
launch_configs = pytest.mark.parametrize("config", CONFIGS)


@pytest.fixture
def many_tiles(config, monkeypatch):
    """Make several tiles or parts of rows of 96, and share them among five programs."""
    monkeypatch.setattr(fused, "choose_launch_config", lambda *_: CONFIGS[config])
    monkeypatch.setattr(fused, "multiprocessors", lambda _: 5)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_values_and_gradients_are_those_of_the_formula(case):
    inputs, grad = case.tensors()
    mine = evaluate(fused.norm_add, inputs, grad, case)
    assert mine["out"].dtype == mine["d residual"].dtype == case.residual_dtype
    assert mine["d sublayer_output"].dtype == mine["d weight"].dtype == case.dtype
    assert worst_in_roundings(mine, exact(inputs, grad, case)) < 1


MISTAKES = {
    "another eps": {"eps": 1e-2},
    "a weight off by one": {"zero_centered_gamma": True},
    "no scales": {"scales": ()},
    "scales the wrong way round": {"scales": cases.SCALES[::-1]},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_argument_would_show(mistake):
    case = Case(layer_norm=True, sublayer_bias=True, scales=cases.SCALES)
    inputs, grad = case.tensors()
    assert (
        worst_in_roundings(
            evaluate(fused.norm_add, inputs, grad, case, **MISTAKES[mistake]), exact(inputs, grad, case)
        )
        > 100
    )


@pytest.mark.parametrize("omitted", ["sublayer_bias", "bias"])
def test_an_omitted_parameter_would_show(omitted):
    case = Case(layer_norm=True, sublayer_bias=True)
    inputs, grad = case.tensors()
    inputs[cases.NAMES.index(omitted)].fill_(0.0)
    with_it, _ = case.tensors()
    mine, theirs = evaluate(fused.norm_add, inputs, grad, case), exact(with_it, grad, case)
    assert cases.errors(mine, theirs)["out"] > 1e-2


@launch_configs
@pytest.mark.parametrize("options", cases.OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tiles_and_programs_sum_to_the_same_gradients(many_tiles, options, dtype):
    case = Case((13,), 96, dtype, dtype, *options)
    inputs, grad = case.tensors()
    assert worst_in_roundings(evaluate(fused.norm_add, inputs, grad, case), exact(inputs, grad, case)) < 1


def test_long_rows_are_read_in_parts():
    names = {
        (hidden, plain): [k.__name__ for k in plans.kernels_for(choose_launch_config(hidden, plain), hidden)]
        for hidden in (4096, 8192, 8193)
        for plain in (True, False)
    }
    long = [
        case for case, pair in names.items() if pair == ["long_norm_add_forward", "long_norm_add_backward"]
    ]
    assert long == [(8192, False), (8193, True), (8193, False)]


@launch_configs
def test_a_lost_partial_sum_would_show(many_tiles, monkeypatch):
    case = Case((37,), 96)
    inputs, grad = case.tensors()
    reduce = plans.BackwardPlan._reduce

    def losing_one(self, partials, sums):
        partials[: case.hidden] = 0.0
        reduce(self, partials, sums)

    monkeypatch.setattr(plans.BackwardPlan, "_reduce", losing_one)
    errors = cases.errors(evaluate(fused.norm_add, inputs, grad, case), exact(inputs, grad, case))
    assert errors.pop("d weight") > 1e-2
    assert max(errors.values()) < 2e-6


@pytest.mark.parametrize(
    ("block", "options"),
    [(4, (False, False, False)), (4, (False, True, True)), (4, (True, True, False)), (2, (True, True, True))],
    ids=str,
)
@pytest.mark.parametrize("scales", [(), cases.SCALES])
def test_gradients_are_those_of_finite_differences(block, options, scales, monkeypatch):
    monkeypatch.setattr(fused, "choose_launch_config", lambda *_: LaunchConfig(block, block // 2, 1, 1))
    monkeypatch.setattr(fused, "multiprocessors", lambda _: 1)
    case = Case((2, 1), 3, torch.float64, torch.float64, *options, eps=0.1)
    inputs, _ = case.tensors()
    given = [tensor.requires_grad_() for tensor in inputs if tensor is not None]

    def function(*values):
        values = iter(values)
        tensors = [None if tensor is None else next(values) for tensor in inputs]
        return fused.norm_add(*tensors, case.eps, case.zero_centered_gamma, 0.0, True, *scales)

    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_rows_of_zeros_are_normed_to_zero(layer_norm):
    case = Case(layer_norm=layer_norm)
    inputs, grad = case.tensors()
    inputs[0][2:5] = 0.0
    assert worst_in_roundings(evaluate(fused.norm_add, inputs, grad, case), exact(inputs, grad, case)) < 1


@pytest.mark.parametrize("rows", [(0,), (3, 0), (0, 2)])
def test_no_rows_give_no_values_and_gradients_of_zero(rows):
    case = Case(rows, layer_norm=True, sublayer_bias=True)
    inputs, grad = case.tensors()
    mine = evaluate(fused.norm_add, inputs, grad, case)
    assert mine["out"].shape == mine["d sublayer_output"].shape == (*rows, case.hidden)
    assert not any(mine[f"d {name}"].any() for name in ("sublayer_bias", "weight", "bias"))


def strided(tensor):
    """Return ``[sequence, batch, hidden]`` views of its values that are contiguous nowhere but in rows."""
    wider = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 7), float("nan")).to(tensor)
    wider[..., 3:-4] = tensor
    return {
        "cut out of longer rows": wider[..., 3:-4],
        "batch first": tensor.transpose(0, 1).contiguous().transpose(0, 1),
        "every second element": tensor.repeat_interleave(2, -1)[..., ::2],
    }


@pytest.mark.parametrize("layout", ["cut out of longer rows", "batch first", "every second element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_nothing(layout, dtype):
    case = Case((7, 3), 96, dtype, dtype, layer_norm=True, sublayer_bias=True)
    inputs, grad = case.tensors()
    expected = evaluate(fused.norm_add, inputs, grad, case)
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in inputs]
    viewed = list(leaves)
    for i in (0, 2):
        viewed[i] = strided(leaves[i])[layout]
        assert not viewed[i].is_contiguous()
    out = fused.norm_add(*viewed, case.eps, False, 0.0, True)
    out.backward(strided(grad)[layout])
    assert torch.equal(out, expected["out"])
    for name, leaf in zip(cases.NAMES, leaves, strict=True):
        assert torch.equal(leaf.grad, expected[f"d {name}"]), name


def test_an_expanded_gradient_is_read_as_what_it_stands_for():
    case = Case()
    inputs, grad = case.tensors()
    sublayer_output = inputs[0].requires_grad_()
    fused.norm_add(*inputs, case.eps, False, 0.0, True).sum().backward()
    expected = exact(inputs, torch.ones_like(grad), case)["d sublayer_output"]
    assert (sublayer_output.grad.cpu() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("frozen", cases.NAMES)
def test_what_needs_no_gradient_gets_none_and_changes_no_other(frozen):
    case = Case(layer_norm=True, sublayer_bias=True)
    inputs, grad = case.tensors()
    expected = evaluate(fused.norm_add, inputs, grad, case)
    leaves = [t.clone().requires_grad_(name != frozen) for name, t in zip(cases.NAMES, inputs, strict=True)]
    fused.norm_add(*leaves, case.eps, False, 0.0, True).backward(grad)
    for name, leaf in zip(cases.NAMES, leaves, strict=True):
        assert leaf.grad is None if name == frozen else torch.equal(leaf.grad, expected[f"d {name}"]), name


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_residual_alone_gets_its_gradient(scale):
    case = Case()
    inputs, grad = case.tensors()
    residual = inputs[2].requires_grad_()
    fused.norm_add(*inputs, case.eps, False, 0.0, True, scale, 3.0).backward(grad)
    assert torch.equal(residual.grad, scale * grad)


@pytest.mark.parametrize("name", ["norm_add", "norm_add_norm", "add_norm", "add", "norm"])
def test_scales_of_one_are_no_operation(name):
    """What has no scales keeps its bits."""
    case = Case((7, 3), 96, torch.bfloat16, torch.bfloat16, layer_norm=True, sublayer_bias=True)
    (x, of, residual, weight, bias), _ = case.tensors()
    settings = (1e-5, False)
    arguments = {
        "norm": (x, weight, bias, *settings, torch.bfloat16),
        "add": (x, of, residual, 0.0, True),
        "norm_add_norm": (
            *(x, of, residual, weight, bias, *settings, 0.0, True),
            *(weight, bias, 1e-5, torch.bfloat16),
        ),
    }.get(name, (x, of, residual, weight, bias, *settings, 0.0, True))
    ones = (1.0,) if name == "norm" else (1.0, 1.0)
    function = getattr(fused, name, None) or getattr(reference, name)
    mine, theirs = function(*arguments), function(*arguments, *ones)
    assert all(map(torch.equal, *([t] if isinstance(t, torch.Tensor) else t for t in (mine, theirs))))


def test_the_gradient_of_the_gradient_is_refused_rather_than_wrong():
    inputs, _ = Case().tensors()
    sublayer_output = inputs[0].requires_grad_()
    out = fused.norm_add(*inputs, 1e-5, False, 0.0, True)
    (gradient,) = torch.autograd.grad(out.square().sum(), sublayer_output, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_backward_pass_keeps_the_sublayer_output_and_no_copy_of_it(layer_norm):
    case = Case((64, 2), layer_norm=layer_norm, sublayer_bias=True)
    inputs, _ = case.tensors()
    leaves = [t if t is None else t.requires_grad_() for t in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused.norm_add(*leaves, case.eps, False, 0.0, True)
    assert [t.data_ptr() for t in kept if t.numel() == inputs[0].numel()] == [inputs[0].data_ptr()]
    rows, parameters = 64 * 2, 2 * case.hidden  # sublayer bias and weight
    assert sum(t.numel() for t in kept) == inputs[0].numel() + (1 + layer_norm) * rows + parameters


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_is_written_in_place(grad, dropout):
    inputs, _ = Case(layer_norm=True, sublayer_bias=True).tensors()
    copies = [tensor.clone() for tensor in inputs]
    with torch.set_grad_enabled(grad):
        out = fused.norm_add(*inputs, 1e-5, False, dropout, True)
    assert all(torch.equal(*pair) for pair in zip(inputs, copies, strict=True))
    assert out.data_ptr() not in [tensor.data_ptr() for tensor in inputs]


def test_a_bf16_output_and_an_fp32_stream_round_the_sum_once():
    case = Case((64,), 96, torch.bfloat16, torch.float32)
    inputs, grad = case.tensors()
    mine, theirs = evaluate(fused.norm_add, inputs, grad, case), exact(inputs, grad, case)
    assert cases.errors(mine, theirs)["out"] < 1e-6
    sublayer_output, _, residual, weight, _ = inputs
    rounded = residual + reference.norm(sublayer_output, weight, None, case.eps, False, torch.bfloat16)
    assert cases.errors({**mine, "out": rounded}, theirs)["out"] > 1e-4


def test_the_same_call_gives_the_same_bits():
    case = Case((200,), 160, torch.bfloat16, torch.bfloat16, layer_norm=True, sublayer_bias=True)
    inputs, grad = case.tensors()
    first, *others = (evaluate(fused.norm_add, inputs, grad, case) for _ in range(3))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_a_stream_of_another_shape_is_refused():
    inputs, _ = Case((7, 3)).tensors()
    inputs[2] = inputs[2][:5]
    with pytest.raises(ValueError, match=r"the sublayer's output, \[7, 3, 96\], not \[5, 3, 96\]"):
        fused.norm_add(*inputs, 1e-5, False, 0.0, True)


def test_a_gradient_is_not_differentiated_again():
    inputs, _ = Case().tensors()
    sublayer_output = inputs[0].requires_grad_()
    out = fused.norm_add(*inputs, 1e-5, False, 0.0, True)
    (gradient,) = torch.autograd.grad(out.square().sum(), sublayer_output, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_plans_of_shapes_that_never_come_again_are_forgotten(monkeypatch):
    monkeypatch.setattr(fused, "_MOST_PLANS", 2)
    monkeypatch.setattr(fused, "_plans", {})
    for rows in (1, 2, 3, 1):
        case = Case((rows,))
        inputs, grad = case.tensors()
        assert worst_in_roundings(evaluate(fused.norm_add, inputs, grad, case), exact(inputs, grad, case)) < 1
        assert len(fused._plans) <= 2


def test_a_row_that_is_too_long_is_refused():
    zeros = torch.zeros(1, MAX_NORM_ADD_HIDDEN_SIZE + 1, device=DEVICE)
    with pytest.raises(ValueError, match="hidden size of 16384 at most, not 16385"):
        fused.norm_add(zeros, None, zeros, zeros[0], None, 1e-5, False, 0.0, True)
