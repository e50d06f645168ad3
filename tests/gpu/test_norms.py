"""Every backend of the norms on the GPU: next to fp64 on the CPU, to one another, and to itself."""

import itertools

import pytest
import torch

from megatron_periln.norms import kernels
from tests.norms import formulas
from tests.norms import kernel_cases as cases
from tests.norms.kernel_cases import Case, evaluate, worst_in_roundings

pytestmark = pytest.mark.gpu

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SIZES = (64, 1000, 4096)


@pytest.fixture(autouse=True)
def asked_for(request):
    backend = (
        request.node.callspec.params.get("backend", "auto") if hasattr(request.node, "callspec") else "auto"
    )
    kernels.use_backend(backend)
    yield
    kernels.use_backend("auto")


# torch.compile in two cases a function: each takes seconds, and dynamo gives up after a few.
CASES = [
    *itertools.product(["norm_add"], ["triton", "torch"], ROUNDING, SIZES, [False, True]),
    *itertools.product(["add_norm"], ["torch"], ROUNDING, SIZES, [False, True]),
    *itertools.product(
        ["norm_add", "add_norm"], ["compile"], [torch.float32, torch.bfloat16], [1000], [False]
    ),
]


@pytest.mark.parametrize(("name", "backend", "dtype", "hidden", "layer_norm"), CASES, ids=str)
def test_values_and_gradients_are_those_of_fp64(name, backend, dtype, hidden, layer_norm):
    generator = torch.Generator().manual_seed(3)
    sublayer_output, residual = (torch.randn(7, 3, hidden, generator=generator).to(dtype) for _ in range(2))
    sublayer_bias, weight, bias = (torch.randn(hidden, generator=generator).to(dtype) for _ in range(3))
    parameters = [sublayer_output, sublayer_bias, residual, weight, bias if layer_norm else None]

    def results(function, place):
        tensors = [t if t is None else place(t).requires_grad_() for t in parameters]
        options = () if function.__module__ == formulas.__name__ else (0.0, True)
        out = function(*tensors, 1e-5, False, *options)
        out.sum().backward()
        return [out, *(t.grad for t in tensors if t is not None)]

    exact = results(getattr(formulas, name), lambda t: t.detach().double())
    for mine, theirs in zip(results(getattr(kernels, name), lambda t: t.detach().cuda()), exact, strict=True):
        error = (mine.cpu().double() - theirs).abs().max() / theirs.abs().max()
        assert error < ROUNDING[dtype]


def test_auto_takes_the_fused_kernels():
    assert kernels.backend_for(torch.empty(1, 1024, device="cuda")).name == "triton"


@pytest.mark.parametrize("hidden", [1024, 2048, 2560, 3072, 4096, 8192, 16384])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_many_rows_give_the_same_bits_again_and_what_fp32_gives(hidden, layer_norm):
    case = Case((4099,), hidden, torch.bfloat16, torch.bfloat16, layer_norm, sublayer_bias=layer_norm)
    inputs, grad = case.tensors()
    first = evaluate(kernels.norm_add, inputs, grad, case)
    busy, side = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(side):  # something else on the multiprocessors
            busy @ busy
        again = evaluate(kernels.norm_add, inputs, grad, case)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []
    kernels.use_backend("torch")
    in_fp64 = [None if tensor is None else tensor.double() for tensor in inputs]
    theirs = evaluate(kernels.norm_add, in_fp64, grad.double(), case)
    assert worst_in_roundings(first, {name: tensor.cpu() for name, tensor in theirs.items()}) < 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_cuda_graph_replays_both_passes(dropout):
    """Each replay draws a new mask, in which the passes agree: the gradient passes where the output did."""
    hidden = 256
    ones = torch.ones(64, hidden, device="cuda")
    x, weight = torch.randn(64, hidden, device="cuda").requires_grad_(), ones[0].clone().requires_grad_()
    outs = [torch.empty_like(ones), torch.empty_like(ones)]

    def both_passes():
        out = kernels.norm_add(x, None, torch.zeros_like(ones), weight, None, 1e-5, False, dropout, True)
        (grad_weight,) = torch.autograd.grad(out, [weight], ones)
        outs[0].copy_(out.detach())
        outs[1][0].copy_(grad_weight)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            both_passes()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both_passes()
    replays = []
    for _ in range(2):
        graph.replay()
        torch.testing.assert_close(outs[1][0], outs[0].sum(0), rtol=1e-4, atol=1e-4)
        replays.append(outs[0].clone())
    assert torch.equal(*replays) == (dropout == 0)


def test_the_fused_kernel_agrees_with_transformer_engine():
    te = pytest.importorskip("transformer_engine.pytorch")
    case = Case((512, 2), 2048, torch.bfloat16, torch.bfloat16)
    inputs, grad = case.tensors()
    norm = te.RMSNorm(case.hidden, eps=case.eps, params_dtype=torch.bfloat16, device="cuda")

    def theirs(sublayer_output, sublayer_bias, residual, weight, *_):
        with torch.no_grad():
            norm.weight.copy_(weight)
        normed = torch.func.functional_call(norm, {"weight": weight}, (sublayer_output,))
        return residual + normed

    mine, other = (evaluate(function, inputs, grad, case) for function in (kernels.norm_add, theirs))
    errors = cases.errors(mine, {name: tensor.cpu().double() for name, tensor in other.items()})
    assert max(errors.values()) < 2.0**-7
