"""The kernels of the norm modules, by the backend that is chosen in one place.

`megatron_periln.norms.kernels.reference` specifies what each computes and documents the
arguments, `megatron_periln.norms.kernels.backends` chooses who computes it.
"""

from typing import Any

from torch import Tensor

from megatron_periln.norms.kernels.backends import (
    BACKENDS,
    MAX_JOINED_HIDDEN_SIZE,
    Backend,
    Choice,
    backend_for,
    choose_backend,
    use_backend,
)

__all__ = [
    "BACKENDS",
    "MAX_JOINED_HIDDEN_SIZE",
    "Backend",
    "Choice",
    "add_norm",
    "backend_for",
    "choose_backend",
    "norm",
    "norm_add",
    "norm_add_norm",
    "use_backend",
]


def norm(x: Tensor, *arguments: Any) -> Tensor:
    """Normalize ``x``: `reference.norm`."""
    return backend_for(x).norm(x, *arguments)


def norm_add(branch: Tensor, *arguments: Any) -> Tensor:
    """Normalize ``branch``, then add it to the residual stream: `reference.norm_add`."""
    return backend_for(branch).norm_add(branch, *arguments)


def norm_add_norm(branch: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Normalize ``branch``, add it to the residual stream, normalize the sum: `reference.norm_add_norm`."""
    return backend_for(branch).norm_add_norm(branch, *arguments)


def add_norm(branch: Tensor, *arguments: Any) -> Tensor:
    """Add ``branch`` to the residual stream, then normalize the sum: `reference.add_norm`."""
    return backend_for(branch).add_norm(branch, *arguments)
