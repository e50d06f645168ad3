"""Launching a compiled Triton kernel again, without what Triton does before each launch.

Triton binds a kernel's arguments, some thirty here, to its signature, and looks at each to find the compiled
kernel that fits: that takes the host longer than all else in a call. A call with tensors like those of a call
before needs none of it. It calls the same C function as that one did, with the same arguments but for the
tensors' addresses and the stream.

What Triton gives that function is no public API, and differs from version to version. So a launch of Triton's
own is watched, and where it isn't understood, Triton goes on launching.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterable
from typing import Any

import triton
from triton.runtime import driver

__all__ = ["ALIGNMENT", "Relaunch", "launch"]

ALIGNMENT = 16  # bytes; Triton compiles another kernel for an address that isn't a multiple of it

Relaunch = Callable[..., bool]
"""Launches a kernel again on the addresses of the tensors that it takes first, all else being as before.

Returns False, and launches nothing, where that would not be the same launch: on another device than before,
with an address that is no multiple of `ALIGNMENT`, or while a profiler has Triton tell of launches.
"""

Grid = tuple[int, int, int]

_STREAM, _FUNCTION = 3, 4  # where the C function takes them, after the grid
_runtime = triton.knobs.runtime
_one_at_a_time = threading.Lock()


def launch(kernel: Any, grid: Grid, arguments: dict[str, Any], n_tensors: int) -> Relaunch | None:
    """Launch a kernel, and return how to launch it again.

    Parameters
    ----------
    kernel
        A function that is decorated with ``triton.jit``.
    arguments
        The kernel's arguments and Triton's own, by name.
    n_tensors
        How many of the kernel's arguments are tensors or None. They come first.

    Returns
    -------
    Relaunch or None
        Takes ``n_tensors`` addresses, None where the argument was None. None if Triton alone knows how.
    """
    values = [arguments.get(name) for name in getattr(kernel, "arg_names", ())]
    tensors, others = values[:n_tensors], values[n_tensors:]
    unaligned = _are_unaligned(tensor.data_ptr() for tensor in tensors if tensor is not None)
    compiled = None if unaligned else _loaded(kernel, grid, arguments)
    if compiled is None:
        kernel[grid](**arguments)
        return None
    given, kernel_launcher = _watched_launch(compiled.run, lambda: kernel[grid](**arguments))
    stream = driver.active.get_current_stream(driver.active.get_current_device())
    if given is None or given[: _FUNCTION + 1] != (*grid, stream, compiled.function):
        return None
    nested = isinstance(given[-1], tuple)
    *head, seen = given if nested else (*given[: -len(values)], given[-len(values) :])
    if len(seen) != len(values) or not all(map(_is_same, seen, values)) or any(map(_is_tensor, others)):
        return None
    head = [None if _is_of_hooks(value) else value for value in head]
    if any(map(_is_tensor, head)):  # memory that the launcher allocates for each launch
        return None
    return _relaunch(compiled, kernel_launcher, head[_FUNCTION + 1 :], grid, tuple(others), nested)


def _relaunch(
    compiled: Any,
    c_launch: Callable[..., Any],
    head: list[Any],
    grid: Grid,
    others: tuple[Any, ...],
    nested: bool,
) -> Relaunch:
    """Return what calls ``c_launch``; ``nested`` if it takes a kernel's arguments as one tuple."""
    current_device, current_stream = driver.active.get_current_device, driver.active.get_current_stream
    device = current_device()

    def relaunch(*addresses: int | None) -> bool:
        if current_device() != device or _are_unaligned(addresses) or _is_watched():
            return False
        arguments = (*addresses, *others)
        # The compiled kernel is asked for its function each time, and is thereby kept loaded.
        if nested:
            c_launch(*grid, current_stream(device), compiled.function, *head, arguments)
        else:
            c_launch(*grid, current_stream(device), compiled.function, *head, *arguments)
        return True

    return relaunch


def _loaded(kernel: Any, grid: Grid, arguments: dict[str, Any]) -> Any:
    """Return the compiled kernel that fits the arguments; None if its launch can't be watched."""
    hooks = (_runtime.launch_enter_hook, _runtime.launch_exit_hook)
    if not isinstance(kernel, triton.JITFunction) or kernel.pre_run_hooks:
        return None
    if not all(isinstance(getattr(hook, "calls", None), list) for hook in hooks) or _is_watched():
        return None
    compiled = kernel.warmup(**arguments, grid=grid)
    return compiled if hasattr(getattr(compiled, "run", None), "launch") else None


def _watched_launch(
    launcher: Any, launch: Callable[[], Any]
) -> tuple[tuple[Any, ...] | None, Callable[..., Any]]:
    """Launch; return what the launcher's C function was given, None if not once, and the function."""
    watched: list[tuple[Any, ...]] = []
    thread = threading.get_ident()
    with _one_at_a_time:
        c_launch = launcher.launch

        def watch(*given: Any) -> Any:
            if threading.get_ident() == thread:
                watched.append(given)
            return c_launch(*given)

        launcher.launch = watch
        try:
            launch()
        finally:
            launcher.launch = c_launch
    return (watched[0] if len(watched) == 1 else None), c_launch


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "data_ptr")


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (not _is_tensor(one) and type(one) is type(other) and one == other)


def _is_of_hooks(value: Any) -> bool:
    """Tell whether a value is a hook, or what hooks are given to read."""
    if value is _runtime.launch_enter_hook or value is _runtime.launch_exit_hook:
        return True
    return type(value).__name__ == "LazyDict"


def _are_unaligned(addresses: Iterable[int | None]) -> bool:
    """Tell whether an address is no multiple of `ALIGNMENT`; None, and that of no memory, is one."""
    return bool(functools.reduce(operator.or_, filter(None, addresses), 0) % ALIGNMENT)


def _is_watched() -> bool:
    """Tell whether a profiler is to be told of launches."""
    return bool(_runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls)
