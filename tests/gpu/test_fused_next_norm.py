"""The tests of the kernel that does the next norm too, on the GPU."""

import pytest
import torch

from megatron_periln.norms.kernels import fused
from tests.norms.kernel_cases import Case, worst_in_roundings
from tests.norms.test_fused_next_norm import *  # noqa: F403
from tests.norms.test_fused_next_norm import evaluate, exact, tensors

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("hidden", [1024, 2048, 2560, 4096])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_many_rows_give_the_same_bits_again_and_what_fp64_gives(hidden, layer_norm):
    case = Case((4099,), hidden, torch.bfloat16, torch.bfloat16, layer_norm, sublayer_bias=layer_norm)
    inputs, grads = tensors(case)
    first, again = (evaluate(fused.norm_add_norm, inputs, grads, case) for _ in range(2))
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    assert worst_in_roundings(first, exact(inputs, grads, case)) < 1.5
