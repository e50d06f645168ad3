"""The tests of the kernel with learned scales, on the GPU."""

import pytest
import torch

from tests.norms.kernel_cases import Case, worst_in_roundings
from tests.norms.test_learned_scales import *  # noqa: F403
from tests.norms.test_learned_scales import KINDS, evaluate, exact, tensors

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("hidden", [1024, 2560, 4096, 8192])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_many_rows_give_the_same_bits_again_and_what_fp64_gives(hidden, kind, layer_norm):
    case = Case((4099,), hidden, torch.bfloat16, torch.bfloat16, layer_norm, sublayer_bias=layer_norm)
    inputs, grad = tensors(case, kind)
    first, again = (evaluate(inputs, grad, case) for _ in range(2))
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    assert worst_in_roundings(first, exact(inputs, grad, case)) < 1.5
