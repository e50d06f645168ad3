"""The product that is added to the fp32 gradients, in place of Apex's kernel."""

import pytest
import torch

from megatron_periln.patches.fixes import add_product

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("total", [torch.float32, torch.bfloat16])
def test_it_is_added_without_rounding_it_first(total):
    torch.manual_seed(1)
    inputs, gradients = (torch.randn(4096, n, device="cuda", dtype=torch.bfloat16) for n in (256, 384))
    accumulated = torch.randn(384, 256, device="cuda", dtype=total)
    expected = accumulated.double() + gradients.double().t() @ inputs.double()
    add_product(inputs, gradients, accumulated)
    error = (accumulated.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 4e-3}[total]
    rounded = (gradients.t() @ inputs).double()
    assert (rounded - gradients.double().t() @ inputs.double()).norm() / expected.norm() > 1e-4
