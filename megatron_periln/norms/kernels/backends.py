"""Which implementation computes the norms, and the one function that chooses it.

========  ==================================================================================
backend   what runs
========  ==================================================================================
torch     `reference`, plain PyTorch
compile   ``torch.compile`` of `reference`
triton    `fused` for the output norm, alone or with the next; ``torch.compile`` for the others
auto      triton on a GPU that can run it, else compile; torch on the CPU
========  ==================================================================================
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_periln.norms.kernels import reference

__all__ = [
    "BACKENDS",
    "MAX_JOINED_HIDDEN_SIZE",
    "Backend",
    "Choice",
    "backend_for",
    "choose_backend",
    "use_backend",
]

BACKENDS = ("auto", "triton", "compile", "torch")

MAX_JOINED_HIDDEN_SIZE = 4096  # with the next norm: rows that fit the registers twice

_OLDEST_GPU = (8, 0)  # compute capability with bfloat16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """The functions of `reference`, as one implementation has them."""

    name: str
    norm: Callable[..., Tensor]
    norm_add: Callable[..., Tensor]
    add_norm: Callable[..., Tensor]
    norm_add_norm: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Choice:
    """A backend, and why it was taken."""

    backend: Backend
    reason: str

    def __str__(self) -> str:
        return f"{self.backend.name} ({self.reason})"


_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    reference.norm,
    reference.norm_add,
    reference.add_norm,
    reference.norm_add_norm,
)
_TORCH = Backend("torch", *_FUNCTIONS)

_requested = "auto"


def use_backend(name: str) -> None:
    """Make ``name``, one of `BACKENDS`, the backend of every norm of this process from now on.

    Raises
    ------
    ValueError
        If there is no such backend.
    """
    global _requested
    if name not in BACKENDS:
        raise ValueError(f"unknown norm backend {name!r}; choose from {', '.join(BACKENDS)}")
    _requested = name


def backend_for(tensor: Tensor) -> Backend:
    """Return the backend that normalizes ``tensor``, ``[..., hidden]``, under `use_backend`'s name."""
    return choose_backend(_requested, tensor.device.type, tensor.shape[-1]).backend


@functools.cache
def choose_backend(name: str, device_type: str, hidden_size: int) -> Choice:
    """Choose the implementation of ``name`` for rows of ``hidden_size`` on a device.

    Parameters
    ----------
    name
        One of `BACKENDS`.
    device_type
        ``"cuda"``, ``"cpu"`` or another of torch's.
    hidden_size
        The norms' size.

    Raises
    ------
    ValueError
        If a backend other than ``"auto"`` can't serve there; the message says what to do.
    """
    if name == "auto":
        choice = _choose_automatically(device_type, hidden_size)
    elif name == "triton" and (obstacle := _triton_obstacle(device_type, hidden_size)):
        raise ValueError(f"norm backend 'triton': {obstacle}; choose auto")
    elif name == "compile" and device_type == "cuda" and not _has_triton():
        raise ValueError(
            "norm backend 'compile': on a GPU torch.compile needs Triton; install it, or choose auto"
        )
    else:
        choice = Choice(_named(name), "as asked for")
    logger.info("norm backend for hidden size %d on %s: %s", hidden_size, device_type, choice)
    return choice


def _choose_automatically(device_type: str, hidden_size: int) -> Choice:
    if device_type != "cuda":  # where Triton need not even be imported
        return Choice(_TORCH, "there are no fused kernels for the CPU")
    obstacle = _triton_obstacle(device_type, hidden_size)
    if obstacle is None:
        return Choice(_named("triton"), "bias, norm, dropout and residual add are one kernel")
    return Choice(_named("compile") if _has_triton() else _TORCH, obstacle)


def _named(name: str) -> Backend:
    if name == "torch":
        return _TORCH
    if name == "compile":
        return _compiled()
    from megatron_periln.norms.kernels import fused

    rest = _TORCH if fused.INTERPRETED else _compiled()
    return replace(rest, name="triton", norm_add=fused.norm_add, norm_add_norm=fused.norm_add_norm)


@functools.cache
def _compiled() -> Backend:
    functions: list[Any] = [torch.compile(function) for function in _FUNCTIONS]
    return Backend("compile", *functions)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_obstacle(device_type: str, hidden_size: int) -> str | None:
    """Return why the Triton kernels can't serve, None if they can."""
    if not _has_triton():
        return "Triton is not installed"
    from megatron_periln.norms.kernels import fused, launches

    if device_type != "cuda" and not fused.INTERPRETED:
        return (
            "Triton's kernels need a GPU, or TRITON_INTERPRET=1 in the environment to be interpreted slowly"
        )
    if device_type == "cuda" and torch.cuda.get_device_capability() < _OLDEST_GPU:
        return "the GPU is older than compute capability 8.0"
    if hidden_size > launches.MAX_HIDDEN_SIZE:
        return f"hidden size {hidden_size} is beyond the {launches.MAX_HIDDEN_SIZE} of Triton's kernels"
    return None
