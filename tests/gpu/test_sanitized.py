"""Calls with odd sizes and strides, small enough to run under compute-sanitizer (make gpu-check)."""

import pytest
import torch

from megatron_periln.norms.kernels import fused
from tests.norms.kernel_cases import Case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("hidden", [1, 3, 160, 1000, 2560])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_no_access_is_out_of_bounds(hidden, layer_norm):
    case = Case((33,), hidden, torch.bfloat16, torch.bfloat16, layer_norm, sublayer_bias=layer_norm)
    inputs, grad = case.tensors()
    ends_with_its_memory = torch.zeros(33, hidden + 1, dtype=torch.bfloat16, device="cuda")[:, 1:]
    leaves = [None if t is None else t.requires_grad_() for t in (ends_with_its_memory, *inputs[1:])]
    out = fused.norm_add(*leaves, case.eps, False, 0.3, True)
    out.backward(grad)
    torch.cuda.synchronize()
    assert out.isfinite().all()
    assert all(t.grad.isfinite().all() for t in leaves if t is not None)
