"""What the interpreter of Triton does with bf16, and that no test of this folder relies on it."""

import pytest
import torch
import triton
import triton.language as tl

from tests.conftest import DEVICE
from tests.norms.interpreter import BF16ArithmeticError

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="about the interpreter, which only the CPU has")

VALUES = torch.tensor([1.0, 1.5, -2.0, 3.0])
# Halfway to the next neighbour, just above and below that, a carry into the exponent, subnormal, infinite.
BITS = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x3FFFFFFF, 0x00008000, 0x7F800000]
ROUNDED = torch.tensor(BITS, dtype=torch.int64).to(torch.int32).view(torch.float32)


@triton.jit
def add(x, y, out, size: tl.constexpr):
    i = tl.arange(0, size)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def add_in_fp32(x, y, out, size: tl.constexpr):
    i = tl.arange(0, size)
    total = tl.load(x + i).to(tl.float32) + tl.load(y + i).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty))


@triton.jit
def sum_all(x, out, size: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, size)), 0))


@triton.jit
def cast(x, out, size: tl.constexpr):
    i = tl.arange(0, size)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


def run(kernel, *tensors):
    """Return what a kernel writes in bf16."""
    out = torch.zeros_like(tensors[0], dtype=torch.bfloat16)
    kernel[(1,)](*tensors, out, tensors[0].numel())
    return out


def test_casts_to_bf16_round_to_nearest():
    assert torch.equal(run(cast, ROUNDED), ROUNDED.bfloat16())
    assert run(cast, torch.full((2,), torch.nan)).isnan().all()


def test_upstream_still_cuts_bf16_off(monkeypatch):
    monkeypatch.undo()
    assert not torch.equal(run(cast, ROUNDED), ROUNDED.bfloat16())


def test_arithmetic_in_fp32_is_let_through():
    x = VALUES.bfloat16()
    assert torch.equal(run(add_in_fp32, x, x), 2 * x)
    assert torch.equal(run(cast, x), x)


@pytest.mark.parametrize("kernel", [add, sum_all])
def test_arithmetic_in_bf16_is_refused(kernel):
    tensors = [VALUES.bfloat16()] * (2 if kernel is add else 1)
    with pytest.raises(Exception, match=f"{BF16ArithmeticError.__name__}.* of bf16"):
        run(kernel, *tensors)


def test_upstream_still_adds_bf16_as_integers(monkeypatch):
    monkeypatch.undo()
    x = VALUES.bfloat16()
    assert not torch.equal(run(add, x, x), 2 * x)
