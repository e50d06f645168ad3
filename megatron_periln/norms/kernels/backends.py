"""Which implementation computes the norms, the one function that chooses it, and the functions that ask it.

========  ==================================================================================
backend   what runs
========  ==================================================================================
torch     `reference`, plain PyTorch
compile   `compiled`: ``torch.compile`` of `reference`
triton    `fused` for the output norm, alone or with the next; `compiled` for the others
auto      triton on a GPU that can run it, else compile; torch on the CPU
========  ==================================================================================
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from megatron_periln.norms.kernels import reference
from megatron_periln.norms.kernels.compiled import compile_for_both_passes
from megatron_periln.norms.kernels.launch_config import MAX_NORM_ADD_HIDDEN_SIZE

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendChoice",
    "NormAddArguments",
    "add",
    "add_norm",
    "backend_for",
    "choose_backend",
    "gate_scales",
    "gpas",
    "has_triton",
    "norm",
    "norm_add",
    "norm_add_norm",
    "use_backend",
]

BACKENDS = ("auto", "triton", "compile", "torch")

_OLDEST_GPU = (8, 0)  # compute capability with bfloat16

logger = logging.getLogger(__name__)

# The functions of `reference` as types, with arguments by position, which is how autograd takes them, but for
# the scales that come last and need not be given. Those of `norm_add`, from sublayer_output to training, come
# first in `norm_add_norm` too.
NormAddArguments = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, float, bool, float, bool]
Norm = Callable[..., Tensor]
NormAdd = Callable[..., Tensor]
NormAddNorm = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Backend:
    """The functions of `reference`, as one implementation has them."""

    name: str
    norm: Norm
    norm_add: NormAdd
    add_norm: NormAdd
    norm_add_norm: NormAddNorm
    add: NormAdd = reference.add
    gpas: Callable[[Tensor, Tensor], Tensor] = reference.gpas
    gate_scales: Callable[[Tensor], tuple[Tensor, Tensor]] = reference.gate_scales


@dataclass(frozen=True)
class BackendChoice:
    """A backend, and why it was taken."""

    backend: Backend
    reason: str

    def __str__(self) -> str:
        return f"{self.backend.name} ({self.reason})"


_TORCH = Backend("torch", reference.norm, reference.norm_add, reference.add_norm, reference.norm_add_norm)

_requested = "auto"


def _by_backend[**P, R](specification: Callable[P, R]) -> Callable[P, R]:
    """Return a function of `reference` as the backend for its first argument computes it."""

    @functools.wraps(specification)
    def compute(*args: P.args, **kwargs: P.kwargs) -> R:
        return getattr(backend_for(cast(Tensor, args[0])), specification.__name__)(*args, **kwargs)

    return compute


norm = _by_backend(reference.norm)
norm_add = _by_backend(reference.norm_add)
norm_add_norm = _by_backend(reference.norm_add_norm)
add_norm = _by_backend(reference.add_norm)
add = _by_backend(reference.add)
gpas = _by_backend(reference.gpas)
gate_scales = _by_backend(reference.gate_scales)


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
def choose_backend(name: str, device_type: str, hidden_size: int) -> BackendChoice:
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
    elif name == "triton" and (reason := _why_not_triton(device_type, hidden_size)):
        raise ValueError(f"norm backend 'triton': {reason}; choose auto")
    elif name == "compile" and device_type == "cuda" and not has_triton():
        raise ValueError(
            "norm backend 'compile': on a GPU torch.compile needs Triton; install it, or choose auto"
        )
    else:
        choice = BackendChoice(_named(name), "as asked for")
    logger.info("norm backend for hidden size %d on %s: %s", hidden_size, device_type, choice)
    return choice


def _choose_automatically(device_type: str, hidden_size: int) -> BackendChoice:
    if device_type != "cuda":  # where Triton need not even be imported
        return BackendChoice(_TORCH, "there are no fused kernels for the CPU")
    reason = _why_not_triton(device_type, hidden_size)
    if reason is None:
        return BackendChoice(_named("triton"), "bias, norm, dropout and residual add are one kernel")
    return BackendChoice(_named("compile") if has_triton() else _TORCH, reason)


def _named(name: str) -> Backend:
    if name == "torch":
        return _TORCH
    if name == "compile":
        return _compiled()
    from megatron_periln.norms.kernels import fused  # imports Triton: a second, which --help does without

    rest = _TORCH if fused.INTERPRETED else _compiled()
    return replace(rest, name="triton", norm_add=fused.norm_add, norm_add_norm=fused.norm_add_norm)


@functools.cache
def _compiled() -> Backend:
    return Backend(
        "compile",
        compile_for_both_passes(reference.norm),
        compile_for_both_passes(reference.norm_add),
        compile_for_both_passes(reference.add_norm),
        compile_for_both_passes(reference.norm_add_norm),
        compile_for_both_passes(reference.add),
        compile_for_both_passes(reference.gpas),
        compile_for_both_passes(reference.gate_scales),
    )


def has_triton() -> bool:
    """Tell whether Triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


def _why_not_triton(device_type: str, hidden_size: int) -> str | None:
    """Return why the Triton kernels can't serve, None if they can."""
    if not has_triton():
        return "Triton is not installed"
    from megatron_periln.norms.kernels import fused  # as above

    if device_type != "cuda" and not fused.INTERPRETED:
        return (
            "Triton's kernels need a GPU, or TRITON_INTERPRET=1 in the environment to be interpreted slowly"
        )
    if device_type == "cuda" and torch.cuda.get_device_capability() < _OLDEST_GPU:
        return "the GPU is older than compute capability 8.0"
    if hidden_size > MAX_NORM_ADD_HIDDEN_SIZE:
        return f"hidden size {hidden_size} is beyond the {MAX_NORM_ADD_HIDDEN_SIZE} of Triton's kernels"
    return None
