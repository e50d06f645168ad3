"""The fused Triton kernel next to fp64 formulas: interpreted on the CPU, compiled on a GPU."""

import pytest
import torch

from megatron_periln.norms.kernels import fused, launches, reference
from tests.norms import kernel_cases as cases
from tests.norms.kernel_cases import DEVICE, GRID, Case, exact, join, worst_in_roundings

SMALL_TILES = launches.Launch(block=128, tile_rows=2, num_warps=1, programs_per_sm=1)
IN_PARTS = launches.Launch(block=32, tile_rows=1, num_warps=1, programs_per_sm=1)  # as long rows are read
WAYS = {"whole rows": SMALL_TILES, "rows in parts": IN_PARTS}
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def cut_up(way, monkeypatch):
    """Cut rows of 96 into several tiles or parts, and share them among five programs."""
    monkeypatch.setattr(fused, "launch", lambda *_: WAYS[way])
    monkeypatch.setattr(fused, "_multiprocessors", lambda _: 5)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_values_and_gradients_are_those_of_the_formula(case):
    inputs, grad = case.tensors()
    mine = join(fused.norm_add, inputs, grad, case)
    assert mine["out"].dtype == mine["d residual"].dtype == case.residual
    assert mine["d branch"].dtype == mine["d gain"].dtype == case.branch
    assert worst_in_roundings(mine, exact(inputs, grad, case)) < 1


MISTAKES = {
    "another eps": {"eps": 1e-2},
    "a gain off by one": {"zero_centered_gamma": True},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_argument_would_show(mistake):
    case = Case(shift=True, bias=True)
    inputs, grad = case.tensors()
    assert (
        worst_in_roundings(
            join(fused.norm_add, inputs, grad, case, **MISTAKES[mistake]), exact(inputs, grad, case)
        )
        > 100
    )


@pytest.mark.parametrize("left_out", ["bias", "shift"])
def test_a_left_out_parameter_would_show(left_out):
    case = Case(shift=True, bias=True)
    inputs, grad = case.tensors()
    inputs[cases.NAMES.index(left_out)].fill_(0.0)
    with_it, _ = case.tensors()
    mine, theirs = join(fused.norm_add, inputs, grad, case), exact(with_it, grad, case)
    assert cases.errors(mine, theirs)["out"] > 1e-2


@each_way
@pytest.mark.parametrize("options", cases.OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tiles_and_programs_sum_to_the_same_gradients(cut_up, options, dtype):
    case = Case((13,), 96, dtype, dtype, *options)
    inputs, grad = case.tensors()
    assert worst_in_roundings(join(fused.norm_add, inputs, grad, case), exact(inputs, grad, case)) < 1


def test_long_rows_are_read_in_parts():
    kernels = {
        (hidden, plain): launches.backward_kernel(launches.launch(hidden, plain), hidden).__name__
        for hidden in (4096, 8192, 8193)
        for plain in (True, False)
    }
    long = [case for case, name in kernels.items() if name == "long_norm_add_backward"]
    assert long == [(8192, False), (8193, True), (8193, False)]


@each_way
def test_a_lost_partial_sum_would_show(cut_up, monkeypatch):
    case = Case((37,), 96)
    inputs, grad = case.tensors()
    whole = fused.sum_partials
    monkeypatch.setattr(fused, "sum_partials", lambda sums, dtype: whole(sums[:, 1:].contiguous(), dtype))
    errors = cases.errors(join(fused.norm_add, inputs, grad, case), exact(inputs, grad, case))
    assert errors.pop("d gain") > 1e-2
    assert max(errors.values()) < 2e-6


@pytest.mark.parametrize(
    ("block", "options"),
    [(4, (False, False, False)), (4, (False, True, True)), (4, (True, True, False)), (2, (True, True, True))],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(block, options, monkeypatch):
    monkeypatch.setattr(fused, "launch", lambda *_: launches.Launch(block, block // 2, 1, 1))
    monkeypatch.setattr(fused, "_multiprocessors", lambda _: 1)
    case = Case((2, 1), 3, torch.float64, torch.float64, *options, eps=0.1)
    inputs, _ = case.tensors()
    given = [tensor.requires_grad_() for tensor in inputs if tensor is not None]

    def function(*values):
        values = iter(values)
        tensors = [None if tensor is None else next(values) for tensor in inputs]
        return fused.norm_add(*tensors, case.eps, case.zero_centered_gamma, 0.0, True)

    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize("shift", [False, True])
def test_rows_of_zeros_are_normed_to_zero(shift):
    case = Case(shift=shift)
    inputs, grad = case.tensors()
    inputs[0][2:5] = 0.0
    assert worst_in_roundings(join(fused.norm_add, inputs, grad, case), exact(inputs, grad, case)) < 1


@pytest.mark.parametrize("rows", [(0,), (3, 0), (0, 2)])
def test_no_rows_give_no_values_and_gradients_of_zero(rows):
    case = Case(rows, shift=True, bias=True)
    inputs, grad = case.tensors()
    mine = join(fused.norm_add, inputs, grad, case)
    assert mine["out"].shape == mine["d branch"].shape == (*rows, case.hidden)
    assert not any(mine[f"d {name}"].any() for name in ("bias", "gain", "shift"))


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
    case = Case((7, 3), 96, dtype, dtype, shift=True, bias=True)
    inputs, grad = case.tensors()
    expected = join(fused.norm_add, inputs, grad, case)
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
    branch = inputs[0].requires_grad_()
    fused.norm_add(*inputs, case.eps, False, 0.0, True).sum().backward()
    expected = exact(inputs, torch.ones_like(grad), case)["d branch"]
    assert (branch.grad.cpu() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("frozen", cases.NAMES)
def test_what_needs_no_gradient_gets_none_and_changes_no_other(frozen):
    case = Case(shift=True, bias=True)
    inputs, grad = case.tensors()
    expected = join(fused.norm_add, inputs, grad, case)
    leaves = [t.clone().requires_grad_(name != frozen) for name, t in zip(cases.NAMES, inputs, strict=True)]
    fused.norm_add(*leaves, case.eps, False, 0.0, True).backward(grad)
    for name, leaf in zip(cases.NAMES, leaves, strict=True):
        assert leaf.grad is None if name == frozen else torch.equal(leaf.grad, expected[f"d {name}"]), name


def test_a_residual_alone_gets_its_gradient():
    case = Case()
    inputs, grad = case.tensors()
    residual = inputs[2].requires_grad_()
    fused.norm_add(*inputs, case.eps, False, 0.0, True).backward(grad)
    assert torch.equal(residual.grad, grad)


def test_the_gradient_of_the_gradient_is_refused_rather_than_wrong():
    inputs, _ = Case().tensors()
    branch = inputs[0].requires_grad_()
    out = fused.norm_add(*inputs, 1e-5, False, 0.0, True)
    (gradient,) = torch.autograd.grad(out.square().sum(), branch, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("shift", [False, True])
def test_the_backward_pass_keeps_the_branch_and_no_copy_of_it(shift):
    case = Case((64, 2), shift=shift, bias=True)
    inputs, _ = case.tensors()
    leaves = [t if t is None else t.requires_grad_() for t in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused.norm_add(*leaves, case.eps, False, 0.0, True)
    assert [t.data_ptr() for t in kept if t.numel() == inputs[0].numel()] == [inputs[0].data_ptr()]
    rows, parameters = 64 * 2, 2 * case.hidden  # bias and gain
    assert sum(t.numel() for t in kept) == inputs[0].numel() + (1 + shift) * rows + parameters


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_is_written_in_place(grad, dropout):
    inputs, _ = Case(shift=True, bias=True).tensors()
    copies = [tensor.clone() for tensor in inputs]
    with torch.set_grad_enabled(grad):
        out = fused.norm_add(*inputs, 1e-5, False, dropout, True)
    assert all(torch.equal(*pair) for pair in zip(inputs, copies, strict=True))
    assert out.data_ptr() not in [tensor.data_ptr() for tensor in inputs]


def test_a_bf16_branch_and_an_fp32_stream_round_the_sum_once():
    case = Case((64,), 96, torch.bfloat16, torch.float32)
    inputs, grad = case.tensors()
    mine, theirs = join(fused.norm_add, inputs, grad, case), exact(inputs, grad, case)
    assert cases.errors(mine, theirs)["out"] < 1e-6
    branch, _, residual, gain, _ = inputs
    rounded = residual + reference.norm(branch, gain, None, case.eps, False, torch.bfloat16)
    assert cases.errors({**mine, "out": rounded}, theirs)["out"] > 1e-4


def test_the_same_call_gives_the_same_bits():
    case = Case((200,), 160, torch.bfloat16, torch.bfloat16, shift=True, bias=True)
    inputs, grad = case.tensors()
    first, *others = (join(fused.norm_add, inputs, grad, case) for _ in range(3))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_a_row_that_is_too_long_is_refused():
    branch = torch.zeros(1, launches.MAX_HIDDEN_SIZE + 1, device=DEVICE)
    with pytest.raises(ValueError, match="hidden size of 16384 at most, not 16385"):
        fused.norm_add(branch, None, branch, branch[0], None, 1e-5, False, 0.0, True)
