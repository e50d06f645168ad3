"""The norms on the GPU, next to fp64 on the CPU."""

import pytest
import torch

from megatron_periln.norms import kernels

pytestmark = pytest.mark.gpu

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("function", [kernels.norm_add, kernels.add_norm])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("hidden", [64, 1000, 4096])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_joined_branch_equals_fp64(function, dtype, hidden, shifted):
    generator = torch.Generator().manual_seed(3)
    branch, residual = (torch.randn(7, 3, hidden, generator=generator).to(dtype) for _ in range(2))
    bias, gain, shift = (torch.randn(hidden, generator=generator).to(dtype) for _ in range(3))
    parameters = [branch, bias, residual, gain, shift if shifted else None]

    def join(place):
        tensors = [t if t is None else place(t).requires_grad_() for t in parameters]
        out = function(*tensors, 1e-5, False, 0.0, True)
        out.sum().backward()
        return [out, *(t.grad for t in tensors if t is not None)]

    exact = join(lambda t: t.detach().double())
    for mine, theirs in zip(join(lambda t: t.detach().cuda()), exact, strict=True):
        error = (mine.cpu().double() - theirs).abs().max() / theirs.abs().max()
        assert error < ROUNDING[dtype]
