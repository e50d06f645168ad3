"""Triton's interpreter, made to compute in bf16 as a GPU does, or to refuse.

It keeps bf16 as 16-bit integers: it adds, compares and sums them as such, and cuts fp32 off to bf16 where a
GPU rounds to nearest. Tests that hold kernels to bf16's rounding must rely on neither.
"""

import functools
import inspect
import math

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


def repeat_less():
    """Let the interpreter do once what it does for each call of a function, or for each operation.

    Most of its time goes there: it looks through Triton's modules for functions to replace, writes the names
    of types and checks their shapes. What it computes, and in which order, stays.
    """
    if interpreter._patch_builtin is _patch_builtin:
        return
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang = functools.partial(_patch_lang, interpreter._patch_lang)
    interpreter._LangPatchScope = _Scope
    interpreter._get_np_dtype = functools.partial(_numpy_dtype, interpreter._get_np_dtype, {})
    tl.block_type.__init__ = _block_type(tl.block_type.__init__)
    tl.tensor.__init__ = _tensor
    semantic = type(interpreter.interpreter_semantic)
    semantic.broadcast_impl_value = _broadcast(semantic.broadcast_impl_value)
    semantic.binary_op_sanitize_overflow_impl = _look_for_overflow(semantic.binary_op_sanitize_overflow_impl)


@functools.cache
def _builtins(package):
    """Return the names of a module's functions, themselves, and what the interpreter replaces each with."""
    members = [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    return [(name, member, _interpreted(member)) for name, member in members]


def _interpreted(function):
    def call(*args, **kwargs):
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **kwargs)

    return call


def _patch_builtin(package, builder, scope):
    for name, member, interpreted in _builtins(package):
        if getattr(package, name) is member:  # else a calling function has replaced it
            scope.set_attr(package, name, interpreted)


@functools.cache
def _languages(function):
    found = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    return frozenset(language.__name__ for language in (tl, tl.core) if language in found)


_replaced = set()
"""The modules whose functions the kernel that runs has replaced; what it calls need not do it again."""


class _Scope(interpreter._LangPatchScope):
    def restore(self):
        super().restore()
        _replaced.clear()


def _patch_lang(original, function):
    if _languages(function) <= _replaced:
        return _Scope()
    scope = original(function)
    _replaced.update(_languages(function))
    return scope


def _numpy_dtype(original, known, dtype):
    if dtype.name not in known:
        known[dtype.name] = original(dtype)
    return known[dtype.name]


def _block_type(original):
    known = {}

    def init(self, element_ty, shape):
        key = (element_ty.name, *[size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if key not in known:
            original(self, element_ty, shape)
            known[key] = vars(self).copy()
        self.__dict__.update(known[key], element_ty=element_ty)

    return init


def _tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _extent(*(type.shape.values if type.is_block() else ()))


@functools.cache
def _extent(*shape):
    return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))


def _broadcast(original):
    def broadcast(self, left, right):
        types = left.type, right.type
        if all(type.is_block() for type in types) and types[0].shape.values == types[1].shape.values:
            return left, right
        return original(self, left, right)

    return broadcast


def _look_for_overflow(original):
    def look(self, *operands):
        if self.builder.options.debug:  # else it computes in 64 bits, compares, and asserts nothing
            original(self, *operands)

    return look


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


_WITH_DTYPE = (interpreter.TensorHandle, tl.tensor)


def _refusing_bf16(function):
    @functools.wraps(function)
    def checked(self, *args, **kwargs):
        for arg in args:
            for operand in arg if isinstance(arg, tuple) else (arg,):
                if isinstance(operand, _WITH_DTYPE) and operand.dtype.scalar.name == "bf16":
                    raise BF16ArithmeticError(f"{function.__name__} of bf16")
        return function(self, *args, **kwargs)

    return checked
