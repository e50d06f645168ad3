"""Everything that benchmarks/kernel.py times on a GPU computes what it says, with stand-ins for libraries."""

import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_periln.norms import kernels
from megatron_periln.norms.kernels import backends, reference

HIDDEN = 64


class RMSNorm(torch.nn.Module):
    """Transformer Engine's, by its interface."""

    def __init__(self, hidden_size, eps, params_dtype, device):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


@pytest.fixture
def contestants(monkeypatch):
    """The module, where there is a GPU and Transformer Engine, as far as it can tell."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    te = types.ModuleType("transformer_engine")
    te.pytorch = types.ModuleType("transformer_engine.pytorch")
    te.pytorch.RMSNorm = RMSNorm
    for module in (te, te.pytorch):
        module.__spec__ = types.SimpleNamespace(name=module.__name__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    plain = backends.BackendChoice(kernels.choose_backend("torch", "cpu", HIDDEN).backend, "")
    monkeypatch.setattr(kernels, "choose_backend", lambda *_: plain)
    import kernel_contestants  # from the folder that was prepended

    yield kernel_contestants
    del sys.modules["kernel_contestants"]


@pytest.mark.parametrize("kind", ["norm_add", "norm_add_norm", "add_norm"])
def test_every_contestant_computes_its_kind(contestants, kind):
    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(8, HIDDEN, generator=generator, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.nn.Parameter(torch.rand(HIDDEN, generator=generator).to(torch.bfloat16))
    norm = (weight, None, contestants.EPS, False)
    exact = {
        "norm_add": lambda: reference.norm_add(x, None, residual, *norm, 0.0, True),
        "norm_add_norm": lambda: reference.norm_add_norm(
            x, None, residual, *norm, 0.0, True, weight, None, contestants.EPS, x.dtype
        ),
        "add_norm": lambda: reference.add_norm(x, None, residual, *norm, 0.0, True),
    }[kind]()
    functions = getattr(contestants, f"{kind}_contestants")("cuda", HIDDEN)
    assert len(functions) >= 2
    for name, function in functions.items():
        expected = exact
        if "Pre-LN" in name:  # has no output norm: the floor
            expected = x + residual
            if kind == "norm_add_norm":
                expected = (expected, reference.norm(expected, *norm, x.dtype))
        torch.testing.assert_close(function(x, residual, weight), expected, rtol=2e-2, atol=2e-2, msg=name)
