"""The fused Triton kernel with learned scales, one number each or one a channel, next to fp64 formulas."""

import itertools

import pytest
import torch

from megatron_periln.norms.kernels import choose_backend, fused, plans
from megatron_periln.norms.kernels.launch_config import LaunchConfig
from megatron_periln.norms.kernels.self_test import find_failure
from tests.norms import formulas
from tests.norms import kernel_cases as cases
from tests.norms.kernel_cases import DEVICE, DTYPES, OPTIONS, Case
from tests.norms.test_fused_dropout import draw_mask

NAMES = (*cases.NAMES, "residual_scale", "output_scale")
KINDS = ("number", "channel")
kinds = pytest.mark.parametrize("kind", KINDS)
CONFIGS = {
    "whole rows": LaunchConfig(block=128, tile_rows=2, num_warps=1, programs_per_sm=1),
    "rows in parts": LaunchConfig(block=32, tile_rows=1, num_warps=1, programs_per_sm=1),
}
GRID = [
    Case((7, 3), 96, *DTYPES[0], *OPTIONS[6]),
    Case((7, 3), 96, *DTYPES[1], *OPTIONS[0]),
    Case((9,), 160, *DTYPES[2], *OPTIONS[3]),
    Case((9,), 160, *DTYPES[3], *OPTIONS[7]),
    Case((5, 1), 1000, *DTYPES[1], *OPTIONS[5]),
    Case((1,), 4352, *DTYPES[0], *OPTIONS[1]),  # longer than registers hold with learned scales
]


def tensors(case, kind):
    """Return the inputs, learned scales among them, and the gradient of the result."""
    inputs, grad = case.tensors()
    generator = torch.Generator().manual_seed(5)
    size = 1 if kind == "number" else case.hidden
    # Those of channels come from gates, which are computed in fp32.
    dtype = case.dtype if kind == "number" else torch.promote_types(case.dtype, torch.float32)
    scales = [0.5 + torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(2)]
    # Or a sum over all of it, to which errors are relative, could happen to be almost 0.
    grad += (inputs[0] + inputs[2]).to(grad.dtype) / 2
    return [*inputs, *(scale.to(DEVICE, dtype) for scale in scales)], grad


def evaluate(inputs, grad, case, dropout=0.0):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    settings = (case.eps, case.zero_centered_gamma, dropout, True)
    return collect(leaves, fused.norm_add(*leaves[:5], *settings, *leaves[5:]), grad)


def exact(inputs, grad, case, mask=1.0):
    """Return the same by the fp64 formulas; ``mask`` is 0 or 1/(1-p) where there is dropout."""
    leaves = [None if t is None else t.detach().cpu().double().requires_grad_() for t in inputs]
    settings = (case.eps, case.zero_centered_gamma)
    out = formulas.norm_add(*leaves[:5], *settings, mask=mask, scales=leaves[5:])
    return collect(leaves, out, grad.cpu().double())


def collect(leaves, out, grad):
    out.backward(grad)
    named = {f"d {name}": leaf.grad for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    return {"out": out.detach(), **named}


@pytest.fixture
def many_tiles(config, monkeypatch):
    """Make several tiles or parts of rows of 96, and share them among five programs."""
    monkeypatch.setattr(fused, "choose_launch_config", lambda *_: CONFIGS[config])
    monkeypatch.setattr(fused, "multiprocessors", lambda _: 5)


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, KINDS[i % 2]) for i, case in enumerate(GRID)), (GRID[1], KINDS[0])], ids=str
)
def test_values_and_gradients_are_those_of_the_formula(case, kind):
    inputs, grad = tensors(case, kind)
    mine = evaluate(inputs, grad, case)
    assert [mine[f"d {name}"].dtype for name in NAMES[-2:]] == [inputs[-1].dtype] * 2
    assert mine["d weight"].dtype == case.dtype
    assert cases.worst_in_roundings(mine, exact(inputs, grad, case)) < 1


@pytest.mark.parametrize("config", CONFIGS)
@kinds
def test_many_tiles_and_programs_sum_to_the_same_gradients(many_tiles, kind):
    """With all that there is, dropout too, which the gradient of what multiplies its result goes through."""
    case = Case((7,), 96, layer_norm=True, sublayer_bias=True)
    inputs, grad = tensors(case, kind)
    mask = draw_mask(7, 96, seed=5).cpu()
    torch.manual_seed(5)
    mine = evaluate(inputs, grad, case, dropout=0.3)
    assert cases.worst_in_roundings(mine, exact(inputs, grad, case, mask)) < 1
    assert cases.errors(mine, exact(inputs, grad, case))["d output_scale"] > 1e-2  # of another mask


@pytest.mark.parametrize(("config", "kind"), zip(CONFIGS, KINDS, strict=True))
def test_a_lost_partial_sum_would_show(many_tiles, kind, monkeypatch):
    case = Case((7,), 96)
    inputs, grad = tensors(case, kind)
    launch = plans.BackwardPlan._launch_sum

    def losing_one(self, launcher, partials, sums, width):
        if launcher is self._sum_of_scales:
            partials[:width] = 0.0
        launch(self, launcher, partials, sums, width)

    monkeypatch.setattr(plans.BackwardPlan, "_launch_sum", losing_one)
    errors = cases.errors(evaluate(inputs, grad, case), exact(inputs, grad, case))
    assert errors.pop("d residual_scale") > 1e-3
    assert max(errors.values()) < 2e-6


@pytest.mark.parametrize("wrong", [(6, 5), (5, 5)], ids=["the wrong way round", "one for the other"])
def test_a_wrong_scale_would_show(wrong):
    inputs, grad = tensors(GRID[0], "channel")
    mistaken = [*inputs[:5], *(inputs[index] for index in wrong)]
    mine, theirs = evaluate(mistaken, grad, GRID[0]), exact(inputs, grad, GRID[0])
    assert cases.worst_in_roundings(mine, theirs) > 100


@pytest.mark.parametrize(
    ("block", "options", "kind"),
    [(4, (True, True, True), "channel"), (2, (True, True, False), "number")],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(block, options, kind, monkeypatch):
    monkeypatch.setattr(fused, "choose_launch_config", lambda *_: LaunchConfig(block, block // 2, 1, 1))
    monkeypatch.setattr(fused, "multiprocessors", lambda _: 1)
    case = Case((2, 1), 3, torch.float64, torch.float64, *options, eps=0.1)
    inputs, _ = tensors(case, kind)
    given = [tensor.requires_grad_() for tensor in inputs if tensor is not None]

    def function(*values):
        values = iter(values)
        all_seven = [None if tensor is None else next(values) for tensor in inputs]
        settings = (case.eps, case.zero_centered_gamma, 0.0, True)
        return fused.norm_add(*all_seven[:5], *settings, *all_seven[5:])

    assert torch.autograd.gradcheck(function, given)


@kinds
def test_the_sum_has_the_bits_of_constants(kind):
    case = Case((7, 3), 96, torch.bfloat16, torch.bfloat16, layer_norm=True, sublayer_bias=True)
    inputs, _ = case.tensors()
    settings, constants = (case.eps, False, 0.0, True), (0.75, -1.5)
    size = 1 if kind == "number" else case.hidden
    learned = [torch.full((size,), value, device=DEVICE) for value in constants]
    out = fused.norm_add(*inputs, *settings, *learned)
    assert torch.equal(out, fused.norm_add(*inputs, *settings, *constants))


@kinds
def test_the_same_call_gives_the_same_bits(kind):
    case = Case((24,), 160, torch.bfloat16, torch.bfloat16, layer_norm=True, sublayer_bias=True)
    inputs, grad = tensors(case, kind)
    first, again = (evaluate(inputs, grad, case) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("frozen", [("residual_scale", "output_scale"), ("weight", "bias")], ids=" and ".join)
def test_what_needs_no_gradient_gets_none_and_changes_no_other(frozen):
    case = Case((5,), layer_norm=True, sublayer_bias=True)
    inputs, grad = tensors(case, "number")
    expected = evaluate(inputs, grad, case)
    leaves = [t.clone().requires_grad_(name not in frozen) for name, t in zip(NAMES, inputs, strict=True)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = fused.norm_add(*leaves[:5], case.eps, False, 0.0, True, *leaves[5:])
    out.backward(grad)
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert leaf.grad is None if name in frozen else torch.equal(leaf.grad, expected[f"d {name}"]), name
    # The stream itself is kept, and no copy of it: where the scales have gradients, which are sums over it.
    whole = [leaves[0]] if "residual_scale" in frozen else [leaves[0], leaves[2]]
    assert [t.data_ptr() for t in kept if t.numel() == grad.numel()] == [t.data_ptr() for t in whole]


def test_no_rows_give_gradients_of_zero():
    case = Case((0, 2), layer_norm=True)
    inputs, grad = tensors(case, "number")
    mine = evaluate(inputs, grad, case)
    assert mine["out"].shape == (0, 2, 96)
    assert not any(mine[f"d {name}"].any() for name in ("weight", "residual_scale", "output_scale"))


def test_strides_change_nothing():
    case = Case((7, 3), 96)
    inputs, grad = tensors(case, "number")
    expected = evaluate(inputs, grad, case)
    wide = inputs[2].repeat_interleave(2, -1)[..., ::2].requires_grad_()
    scales = [scale.requires_grad_() for scale in inputs[5:]]
    out = fused.norm_add(*inputs[:2], wide, *inputs[3:5], case.eps, False, 0.0, True, *scales)
    gradients = torch.autograd.grad(out, [wide, *scales], grad.transpose(0, 1).contiguous().transpose(0, 1))
    for name, gradient in zip(("residual", *NAMES[-2:]), gradients, strict=True):
        assert torch.equal(gradient, expected[f"d {name}"]), name


def test_what_the_kernels_do_not_take_is_refused():
    case = Case()
    inputs, _ = tensors(case, "number")
    settings = (case.eps, False, 0.0, True)
    for mixed in ((inputs[5], 1.0), (1.0, inputs[6])):
        with pytest.raises(ValueError, match="constants, or two that are learned"):
            fused.norm_add(*inputs[:5], *settings, *mixed)
    with pytest.raises(ValueError, match=r"both \[1\] or \[96\], not \[\[1\], \[96\]\]"):
        fused.norm_add(*inputs[:5], *settings, inputs[5], inputs[3])
    with pytest.raises(ValueError, match="with the next norm take scales that are constants"):
        next_norm = (inputs[3], None, case.eps, torch.float32)
        fused.norm_add_norm(*inputs[:5], *settings, *next_norm, *inputs[5:])


@pytest.mark.parametrize(
    ("learned", "dtypes"), itertools.product(["scales", "gates"], (DTYPES[0], DTYPES[1]))
)
def test_the_self_test_tries_them(learned, dtypes):
    backend = choose_backend("triton", DEVICE, 96).backend
    options = {"layer_norm": False, "zero_centered_gamma": False, "with_next": False, "learned": learned}
    assert find_failure(backend, torch.device(DEVICE), 96, *dtypes, **options) is None


def test_the_self_test_finds_a_wrong_gradient(monkeypatch):
    backend = choose_backend("triton", DEVICE, 96).backend
    options = {"layer_norm": False, "zero_centered_gamma": False, "with_next": False, "learned": "scales"}
    gradients = plans.BackwardPlan.gradients

    def doubled(self, *arguments):
        *others, of_output_scale = gradients(self, *arguments)
        return [*others, 2 * of_output_scale]

    monkeypatch.setattr(plans.BackwardPlan, "gradients", doubled)
    failure = find_failure(backend, torch.device(DEVICE), 96, *DTYPES[0], **options)
    assert failure == "computes something else here, 100.0% off"
