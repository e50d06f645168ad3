"""The tests of the kernel that does the next norm too, on the GPU."""

import pytest
import torch

from megatron_periln.norms.kernels import fused
from tests.norms.kernel_cases import Case, worst_in_roundings
from tests.norms.test_joined_kernel import *  # noqa: F403
from tests.norms.test_joined_kernel import exact, join, tensors

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("hidden", [1024, 2048, 2560, 4096])
@pytest.mark.parametrize("shift", [False, True])
def test_many_rows_give_the_same_bits_again_and_what_fp64_gives(hidden, shift):
    case = Case((4099,), hidden, torch.bfloat16, torch.bfloat16, shift, bias=shift)
    inputs, grads = tensors(case)
    first, again = (join(fused.norm_add_norm, inputs, grads, case) for _ in range(2))
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    assert worst_in_roundings(first, exact(inputs, grads, case)) < 1.5
