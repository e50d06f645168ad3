"""No step that layouts are compared in amplifies rounding, which would hide a fault behind a wider bound."""

import pytest
import torch

from tests.parallel.cases import Case
from tests.parallel.compare import FP32
from tests.parallel.conftest import FIRST, LAST

NUDGE = 1e-6


def nudge_weights():
    """Change each weight by ``NUDGE`` of itself, up or down, before the first step."""
    from megatron.training import training

    train = training.train

    def nudged(forward_step, model, *args, **kwargs):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model[0].parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(1 + NUDGE * signs)
        return train(forward_step, model, *args, **kwargs)

    training.train = nudged


@pytest.mark.parametrize(
    "case", [Case(placement, "mtp") for placement in ("pre", "post", "peri", "output")], ids=str
)
def test_no_step_amplifies_a_nudge(run, case):
    curves = [
        {point["iteration"]: point["grad norm"] for point in job.curve}
        for job in (run(case), run(case, (f"{__name__}.nudge_weights",)))
    ]
    apart = [abs(curves[1][i] - curves[0][i]) / curves[0][i] for i in range(FIRST, LAST + 1)]
    assert len(apart) == LAST - FIRST + 1 and 0 < max(apart) < 5 * FP32["grad_norm"], apart
