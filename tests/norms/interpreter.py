"""Triton's interpreter, made to compute in bf16 as a GPU does, or to refuse.

It keeps bf16 as 16-bit integers: it adds, compares and sums them as such, and cuts fp32 off to bf16 where a
GPU rounds to nearest. Tests that hold kernels to bf16's rounding must rely on neither.
"""

import functools
import inspect

import torch
import triton.language as tl
from triton.runtime import interpreter

from megatron_periln.norms.kernels import fused
from megatron_periln.norms.kernels.triton_rows import SUM_TILE

# What moves numbers, or casts them, whatever their bits mean.
_MOVES = {
    *("create_load", "create_store", "create_masked_load", "create_masked_store", "create_addptr"),
    *("create_fp_ext", "create_fp_trunc", "create_fp_to_fp", "create_bitcast"),
    *("create_splat", "create_broadcast", "create_expand_dims", "create_reshape", "create_trans"),
    *("create_select", "create_join", "create_split", "create_cat"),
}


def find_builtins_once():
    """Let the interpreter look through Triton's modules once, not for each call of a kernel's function.

    It does so for all of their members, a quarter of the time that it takes.
    """
    interpreter._patch_builtin = _patch_builtin


@functools.cache
def _builtins(package):
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package, builder, scope):
    for name in _builtins(package):
        if tl.core.is_builtin(member := getattr(package, name)):  # else a calling function has replaced it
            interpreter._patch_attr(package, name, member, builder, scope)


def sum_in_wide_tiles(monkeypatch):
    """Sum gradients of 512 columns in a program, not 16, of which long rows have thousands of programs.

    They were 0.95 of the time of a test. Each column is summed by itself, in the same order.
    """
    monkeypatch.setitem(SUM_TILE, "tile_columns", 512)
    monkeypatch.setattr(fused, "_plans", {})  # which know how many programs there are


class BF16ArithmeticError(AssertionError):
    """A kernel computes with bf16 as it is, without a cast to fp32."""


def compute_as_a_gpu_does(monkeypatch):
    """Round casts to bf16, and refuse arithmetic in it."""
    monkeypatch.setattr(
        interpreter, "_convert_float", functools.partial(_convert, interpreter._convert_float)
    )
    for name, function in vars(interpreter.InterpreterBuilder).items():
        if name.startswith("create_") and name not in _MOVES:
            monkeypatch.setattr(interpreter.InterpreterBuilder, name, _refusing_bf16(function))
    apply = interpreter.ReduceScanOpInterface.apply
    monkeypatch.setattr(interpreter.ReduceScanOpInterface, "apply", _refusing_bf16(apply))


def _convert(original, numbers, from_dtype, to_dtype, rounding):
    if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
        return original(numbers, from_dtype, to_dtype, rounding)
    bits = torch.from_numpy(numbers.copy()).bfloat16().view(torch.int16).numpy()
    return bits.view("uint16")


def _refusing_bf16(function):
    @functools.wraps(function)
    def checked(self, *args, **kwargs):
        for arg in args:
            for operand in arg if isinstance(arg, tuple) else (arg,):
                dtype = getattr(operand, "dtype", None)
                if isinstance(dtype, tl.dtype) and dtype.scalar == tl.bfloat16:
                    raise BF16ArithmeticError(f"{function.__name__} of bf16")
        return function(self, *args, **kwargs)

    return checked
