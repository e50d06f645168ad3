"""The output norm and the next norm as one kernel, next to fp64 formulas."""

import itertools

import pytest
import torch

from megatron_periln.norms.kernels import fused, reference
from megatron_periln.norms.kernels.launch_config import MAX_NORM_ADD_NORM_HIDDEN_SIZE, LaunchConfig
from tests.norms import formulas
from tests.norms import kernel_cases as cases
from tests.norms.kernel_cases import DEVICE, Case

NEXT_EPS = 1e-3
NAMES = (*cases.NAMES, "next_weight", "next_bias")
SMALL_TILES = LaunchConfig(block=128, tile_rows=2, num_warps=1, programs_per_sm=1)
OPTIONS = [cases.OPTIONS[i] for i in (0, 3, 5, 6)]
GRID = [
    Case((7, 3), 96, *dtypes, *options) for dtypes, options in itertools.product(cases.DTYPES, OPTIONS)
] + [
    Case(*shape, *cases.DTYPES[i % 4], *cases.OPTIONS[j], eps=1.0 if shape[1] < 4 else 1e-5)
    for i, shape in enumerate([*cases.SHAPES[:5], ((2,), 2560), ((1,), 4096)])
    for j in ((0, 6)[i % 2],)
]


def tensors(case):
    """Return the inputs, the next norm's parameters among them, and the gradients of both results."""
    inputs, grad = case.tensors()
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, case.dtype)

    offset = 0.0 if case.zero_centered_gamma else 1.0
    next_norm = [0.3 * random(case.hidden) + offset, random(case.hidden) if case.layer_norm else None]
    return [*inputs, *next_norm], (grad, random(*case.rows, case.hidden))


GRID += [
    Case((7, 3), 96, *cases.DTYPES[i], *cases.OPTIONS[j], scales=cases.SCALES) for i, j in ((0, 0), (1, 6))
]


def evaluate(function, inputs, grads, case, dropout=0.0):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    options = (case.eps, case.zero_centered_gamma, dropout, True)
    results = function(*leaves[:5], *options, *leaves[5:], NEXT_EPS, case.dtype, *case.scales)
    return collect(leaves, results, grads)


def exact(inputs, grads, case):
    """The formulas in fp64; the next norm is that of the sum as it is rounded."""
    leaves = [None if t is None else t.detach().cpu().double().requires_grad_() for t in inputs]
    scales = case.scales or (1, 1)
    out = formulas.norm_add(*leaves[:5], case.eps, case.zero_centered_gamma, scales=scales)
    rounded = out + (out.to(case.residual_dtype).double() - out).detach()
    normed = formulas.norm(rounded, *leaves[5:], NEXT_EPS, case.zero_centered_gamma)
    return collect(leaves, (out, normed), [grad.cpu().double() for grad in grads])


def collect(leaves, results, grads):
    torch.autograd.backward(results, grads)
    named = {f"d {name}": leaf.grad for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    return {"out": results[0].detach(), "normed": results[1].detach(), **named}


@pytest.mark.parametrize("case", GRID, ids=str)
def test_values_and_gradients_are_those_of_the_formulas(case):
    inputs, grads = tensors(case)
    mine = evaluate(fused.norm_add_norm, inputs, grads, case)
    assert mine["out"].dtype == mine["d residual"].dtype == case.residual_dtype
    assert mine["normed"].dtype == mine["d next_weight"].dtype == case.dtype
    assert cases.worst_in_roundings(mine, exact(inputs, grads, case)) < 1.5


def test_two_norms_of_plain_torch_are_these_formulas():
    case = Case(layer_norm=True, sublayer_bias=True)
    inputs, grads = tensors(case)
    mine = evaluate(reference.norm_add_norm, inputs, grads, case)
    assert cases.worst_in_roundings(mine, exact(inputs, grads, case)) < 1


@pytest.mark.parametrize("mistake", ["next_eps", "next_weight", "a gradient"])
def test_a_mistake_would_show(mistake, monkeypatch):
    case = Case(layer_norm=True)
    inputs, grads = tensors(case)
    right = exact(inputs, grads, case)
    if mistake == "next_eps":
        monkeypatch.setitem(globals(), "NEXT_EPS", 1e-2)
    elif mistake == "next_weight":
        inputs[5] = inputs[3]
    else:
        grads = (grads[0], torch.zeros_like(grads[1]))
    assert cases.worst_in_roundings(evaluate(fused.norm_add_norm, inputs, grads, case), right) > 100


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_many_tiles_and_programs_sum_to_the_same_gradients(options, monkeypatch):
    monkeypatch.setattr(fused, "choose_launch_config", lambda *_: SMALL_TILES)
    monkeypatch.setattr(fused, "multiprocessors", lambda _: 5)
    case = Case((13,), 96, torch.float32, torch.float32, *options)
    inputs, grads = tensors(case)
    mine = evaluate(fused.norm_add_norm, inputs, grads, case)
    assert cases.worst_in_roundings(mine, exact(inputs, grads, case)) < 1


@pytest.mark.parametrize("options", [(False, False, False), (True, True, True)], ids=str)
def test_gradients_are_those_of_finite_differences(options, monkeypatch):
    monkeypatch.setattr(fused, "choose_launch_config", lambda *_: LaunchConfig(4, 2, 1, 1))
    monkeypatch.setattr(fused, "multiprocessors", lambda _: 1)
    case = Case((2, 1), 3, torch.float64, torch.float64, *options, eps=0.1)
    inputs, _ = tensors(case)
    given = [tensor.requires_grad_() for tensor in inputs if tensor is not None]

    def function(*values):
        values = iter(values)
        all_seven = [None if tensor is None else next(values) for tensor in inputs]
        return fused.norm_add_norm(
            *all_seven[:5], 0.1, case.zero_centered_gamma, 0.0, True, *all_seven[5:], 0.1, torch.float64
        )

    assert torch.autograd.gradcheck(function, given)


def test_dropout_is_that_of_the_output_norm_alone():
    case = Case((40,), 160, sublayer_bias=True)
    inputs, grads = tensors(case)
    torch.manual_seed(4)
    both = evaluate(fused.norm_add_norm, inputs, grads, case, dropout=0.4)
    torch.manual_seed(4)
    alone = cases.evaluate(fused.norm_add, inputs[:5], grads[0], case, dropout=0.4)
    assert torch.equal(both["out"], alone["out"])
    torch.manual_seed(4)
    only_out = evaluate(fused.norm_add_norm, inputs, (grads[0], 0 * grads[1]), case, dropout=0.4)
    assert cases.errors(only_out, {**only_out, **alone})["d sublayer_output"] < 1e-6


@pytest.mark.parametrize("which", [0, 1])
def test_one_result_alone_has_a_gradient(which):
    case = Case(layer_norm=True, sublayer_bias=True)
    inputs, grads = tensors(case)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    options = (case.eps, case.zero_centered_gamma, 0.0, True)
    results = fused.norm_add_norm(*leaves[:5], *options, *leaves[5:], NEXT_EPS, case.dtype)
    results[which].backward(grads[which])
    kept = [grad if i == which else 0 * grad for i, grad in enumerate(grads)]
    expected = exact(inputs, kept, case)
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert (leaf.grad.cpu() - expected[f"d {name}"]).abs().max() < 1e-5, name


@pytest.mark.parametrize("frozen", ["weight", "next_weight"])
def test_a_frozen_weight_gets_no_gradient(frozen):
    case = Case()
    inputs, grads = tensors(case)
    leaves = [
        t if t is None else t.clone().requires_grad_(name != frozen)
        for name, t in zip(NAMES, inputs, strict=True)
    ]
    results = fused.norm_add_norm(*leaves[:5], case.eps, False, 0.0, True, *leaves[5:], NEXT_EPS, case.dtype)
    torch.autograd.backward(results, grads)
    assert leaves[NAMES.index(frozen)].grad is None
    assert (leaves[0].grad.cpu() - exact(inputs, grads, case)["d sublayer_output"]).abs().max() < 1e-5


def test_no_rows_give_nothing():
    case = Case((0, 2), layer_norm=True, sublayer_bias=True)
    inputs, grads = tensors(case)
    mine = evaluate(fused.norm_add_norm, inputs, grads, case)
    assert mine["normed"].shape == (0, 2, 96)
    assert not any(
        mine[f"d {name}"].any() for name in ("weight", "next_weight", "next_bias", "sublayer_bias")
    )


def test_the_same_call_gives_the_same_bits():
    case = Case((200,), 160, torch.bfloat16, torch.bfloat16, layer_norm=True, sublayer_bias=True)
    inputs, grads = tensors(case)
    first, second = (evaluate(fused.norm_add_norm, inputs, grads, case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_row_that_is_too_long_is_refused():
    longest = MAX_NORM_ADD_NORM_HIDDEN_SIZE
    zeros = torch.zeros(1, longest + 1, device=DEVICE)
    next_norm = (zeros[0], None, 1e-5, torch.float32)
    with pytest.raises(ValueError, match=f"hidden size of {longest} at most, not {longest + 1}"):
        fused.norm_add_norm(zeros, None, zeros, zeros[0], None, 1e-5, False, 0.0, True, *next_norm)
