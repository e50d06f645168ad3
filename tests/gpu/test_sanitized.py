"""Calls with odd sizes and strides, small enough to run under compute-sanitizer (make gpu-check)."""

import pytest
import torch

from megatron_periln.norms.kernels import fused
from tests.norms.kernel_cases import Case, join

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("hidden", [1, 3, 160, 1000, 2560])
@pytest.mark.parametrize("shift", [False, True])
def test_no_access_is_out_of_bounds(hidden, shift):
    case = Case((33,), hidden, torch.bfloat16, torch.bfloat16, shift, bias=shift)
    inputs, grad = case.tensors()
    cut = torch.zeros(33, hidden + 1, dtype=torch.bfloat16, device="cuda")[
        :, 1:
    ]  # ends where its memory ends
    results = join(fused.norm_add, [cut, *inputs[1:]], grad, case, dropout=0.3)
    torch.cuda.synchronize()
    assert all(tensor.isfinite().all() for tensor in results.values())
