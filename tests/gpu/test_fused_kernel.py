"""The tests of the fused kernel, on the GPU: the same grid, compiled instead of interpreted."""

import pytest

from tests.norms.test_fused_dropout import *  # noqa: F403
from tests.norms.test_fused_kernel import *  # noqa: F403

pytestmark = pytest.mark.gpu


def test_the_kernels_are_compiled():
    from megatron_periln.norms.kernels import fused

    assert not fused.INTERPRETED
