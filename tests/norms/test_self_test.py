"""Kernels that don't compute what they should are found before they train a model."""

from dataclasses import replace

import pytest
import torch

from megatron_periln.norms.kernels import choose_backend
from megatron_periln.norms.kernels.self_test import fault
from tests.norms.kernel_cases import DEVICE, DTYPES


def tried(backend, dtypes=DTYPES[0], hidden=96, joined=False, layer_norm=False, zero_centered_gamma=False):
    device = torch.device(DEVICE)
    options = {"layer_norm": layer_norm, "zero_centered_gamma": zero_centered_gamma, "joined": joined}
    return fault(backend, device, hidden, *dtypes, **options)


@pytest.fixture
def triton():
    return choose_backend("triton", DEVICE, 96).backend


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("options", [(False, False), (True, True)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_nothing_is_wrong(triton, dtypes, joined, options):
    layer_norm, zero_centered = options
    assert tried(triton, dtypes, 96, joined, layer_norm, zero_centered) is None


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_wrong_value_is_found(triton, dtypes):
    def off(branch, bias, residual, gain, *rest):
        return triton.norm_add(branch, bias, residual, gain * 1.1, *rest)

    assert "computes something else here" in tried(replace(triton, norm_add=off), dtypes)


def test_a_nan_is_found(triton):
    def nan(*arguments):
        return triton.norm_add(*arguments) * float("nan")

    assert "computes something else here" in tried(replace(triton, norm_add=nan))


def test_a_failure_is_told(triton):
    def failing(*_):
        raise RuntimeError("no\nsuch instruction")

    assert tried(replace(triton, norm_add_norm=failing), joined=True) == (
        "fails here: RuntimeError: no such instruction"
    )
