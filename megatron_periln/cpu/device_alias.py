"""Tensors asked for on ``"cuda"`` are made on the CPU.

Wrapped are the functions that take a device, not the operations on tensors, so training pays
nothing per operation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._device import _device_constructors

from megatron_periln.patches.registry import changes

__all__ = ["install", "on_cpu"]

CPU = torch.device("cpu")


def on_cpu(device: Any) -> Any:
    """Return the CPU for any spelling of the accelerator, and anything else unchanged."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int):
        return CPU
    if isinstance(device, str) and device.split(":", 1)[0] == "cuda":
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


def _with_device_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapper


def _move_to_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Tensor.to`` or ``Module.to``, whose first positional argument may be a device."""

    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(on_cpu(a) if isinstance(a, str | int | torch.device) else a for a in args[:1]) + args[1:]
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        return function(self, *args, **kwargs)

    return wrapper


def _alias_factories() -> None:
    factories = set(_device_constructors())
    factories |= {getattr(torch, name) for name in dir(torch) if name.endswith("_like")}
    for module in (torch, torch.fft):
        for name, value in list(vars(module).items()):
            if callable(value) and value.__hash__ is not None and value in factories:
                setattr(module, name, _with_device_on_cpu(value))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided"):
        setattr(torch.Tensor, name, _with_device_on_cpu(getattr(torch.Tensor, name)))


def _alias_moves() -> None:
    def itself(self: Any, *_: Any, **__: Any) -> Any:
        return self

    for cls in (torch.Tensor, torch.nn.Module):
        cls.to = _move_to_cpu(cls.to)  # type: ignore[method-assign]
        cls.cuda = itself  # type: ignore[method-assign]
    torch.Tensor.pin_memory = itself  # type: ignore[method-assign]

    load = torch.load

    @functools.wraps(load)
    def load_to_cpu(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
        return load(f, map_location=on_cpu(map_location), **kwargs)

    torch.load = load_to_cpu  # type: ignore[assignment]


def _alias_type_names() -> None:
    """Megatron's optimizers group parameters by strings such as ``torch.cuda.FloatTensor``."""
    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def cuda_type(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return tensor_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = cuda_type  # type: ignore[method-assign]


def _alias_process_groups() -> None:
    """Make the groups asked for over NCCL over gloo, without a device of their own."""

    def over_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            args = tuple("gloo" if isinstance(a, str) and a == "nccl" else a for a in args)
            if kwargs.get("backend") == "nccl":
                kwargs["backend"] = "gloo"
            kwargs.pop("device_id", None)
            return function(*args, **kwargs)

        return wrapper

    for name in ("init_process_group", "new_group", "new_subgroups_by_enumeration"):
        wrapped = over_gloo(getattr(distributed_c10d, name))
        setattr(distributed_c10d, name, wrapped)
        setattr(dist, name, wrapped)


@changes(
    "torch.empty",
    "torch.load",
    "torch.Tensor.to",
    "torch.Tensor.cuda",
    "torch.Tensor.pin_memory",
    "torch.Tensor.type",
    "torch.nn.Module.to",
    "torch.nn.Module.cuda",
    "torch.distributed.init_process_group",
    "torch.distributed.new_group",
    "torch.distributed.new_subgroups_by_enumeration",
    why="under `--device cpu`, `cuda` means the CPU wherever a device is named, in `torch.empty` and "
    "all other functions that make tensors too, and NCCL means gloo",
    stays="it is what `--device cpu` is",
)
def install() -> None:
    """Alias the accelerator to the CPU everywhere a device is named."""
    _alias_factories()
    _alias_moves()
    _alias_type_names()
    _alias_process_groups()
