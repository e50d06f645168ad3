"""Kernels that are launched again, by addresses alone, compute what they did when Triton launched them."""

import pytest
import torch

from megatron_periln.norms.kernels import fused
from tests.norms.kernel_cases import Case, evaluate

pytestmark = pytest.mark.gpu

CASES = [
    Case((64, 2), 2048, torch.bfloat16, torch.bfloat16),
    Case((33,), 1000, torch.bfloat16, torch.float32, layer_norm=True, sublayer_bias=True),
    Case((16,), 12288, torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_relaunch_gives_the_same_bits(case, dropout):
    fused._plans.clear()
    inputs, grad = case.tensors()
    results = []
    for stream in (None, None, torch.cuda.Stream()):
        torch.cuda.synchronize()
        torch.manual_seed(1)
        with torch.cuda.stream(stream):
            results.append(evaluate(fused.norm_add, inputs, grad, case, dropout))
        torch.cuda.synchronize()
    (plan,) = fused._plans.values()
    assert plan._forward.relaunch is not None
    assert all(part._backward.relaunch is not None for part in plan._backward.values())
    first, *others = results
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_gpu_gets_its_own_launches():
    case = CASES[0]
    inputs, grad = case.tensors()
    results = []
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        there = [tensor if tensor is None else tensor.to(device) for tensor in inputs]
        results.append(evaluate(fused.norm_add, there, grad.to(device), case))
    for result in results[1:]:
        assert all(torch.equal(results[0][name], result[name].to("cuda:0")) for name in result)
