"""Kernels that don't compute what they should are found before they train a model."""

from dataclasses import replace

import pytest
import torch

from megatron_periln.norms.kernels import choose_backend
from megatron_periln.norms.kernels.self_test import find_failure
from tests.norms.kernel_cases import DEVICE, DTYPES


def failure(backend, dtypes=DTYPES[0], **options):
    options = {"layer_norm": False, "zero_centered_gamma": False, "with_next": False} | options
    return find_failure(backend, torch.device(DEVICE), 96, *dtypes, **options)


@pytest.fixture
def triton():
    return choose_backend("triton", DEVICE, 96).backend


@pytest.mark.parametrize("with_next", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_nothing_is_wrong(triton, dtypes, layer_norm, with_next):
    options = {"layer_norm": layer_norm, "zero_centered_gamma": layer_norm, "with_next": with_next}
    assert failure(triton, dtypes, **options) is None


@pytest.mark.parametrize("with_next", [False, True])
def test_scaled_kernels_are_tried_too(triton, with_next):
    assert failure(triton, DTYPES[1], scaled=True, with_next=with_next) is None
    name = "norm_add_norm" if with_next else "norm_add"

    def unscaled(*arguments):
        return getattr(triton, name)(*arguments[:-2])

    wrong = replace(triton, **{name: unscaled})
    assert "computes something else here" in failure(wrong, scaled=True, with_next=with_next)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_wrong_value_is_found(triton, dtypes):
    def off(sublayer_output, sublayer_bias, residual, weight, *rest):
        return triton.norm_add(sublayer_output, sublayer_bias, residual, weight * 1.1, *rest)

    assert "computes something else here" in failure(replace(triton, norm_add=off), dtypes)


def test_a_nan_is_found(triton):
    def nan(*arguments):
        return triton.norm_add(*arguments) * float("nan")

    assert "computes something else here" in failure(replace(triton, norm_add=nan))


def test_a_failure_is_told(triton):
    def failing(*_):
        raise RuntimeError("no\nsuch instruction")

    assert failure(replace(triton, norm_add_norm=failing), with_next=True) == (
        "fails here: RuntimeError: no such instruction"
    )
