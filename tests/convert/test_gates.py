"""The learned rules beside transformers' classes."""

from types import SimpleNamespace

import pytest
import torch

from megatron_periln.norms import kernels


def test_gates_are_those_of_muse():
    from transformers.models.muse_spark import modeling_muse_spark

    config = SimpleNamespace(hidden_size=6, residual_gate_temperature=0.3)
    theirs = modeling_muse_spark.MuseSparkResidualGate(config)
    gate = torch.tensor([-4.0, -0.3, 0.0, 0.2, 0.9, 30.0])
    theirs.gate.data = gate
    x, y = torch.randn(2, 5, 6)
    a, b = kernels.gate_scales(gate)
    torch.testing.assert_close(a * x + b * y, theirs(x, y))
    torch.testing.assert_close(a[:-1] ** 2 + b[:-1] ** 2, torch.ones(5))
    assert a[-1].item() == pytest.approx(1e-3**0.5)
    a, b = kernels.gate_scales(gate + 0.01)  # negative control
    assert not torch.allclose(a * x + b * y, theirs(x, y))
