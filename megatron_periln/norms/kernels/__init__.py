"""The kernels of the norm modules, by the backend that is chosen in one place.

`megatron_periln.norms.kernels.reference` specifies what each computes and documents the
arguments, `megatron_periln.norms.kernels.backends` chooses who computes it.
"""

from megatron_periln.norms.kernels.backends import (
    BACKENDS,
    Backend,
    BackendChoice,
    NormAddArguments,
    add,
    add_norm,
    backend_for,
    choose_backend,
    gate_scales,
    gpas,
    norm,
    norm_add,
    norm_add_norm,
    use_backend,
)
from megatron_periln.norms.kernels.launch_config import MAX_NORM_ADD_NORM_HIDDEN_SIZE

__all__ = [
    "BACKENDS",
    "MAX_NORM_ADD_NORM_HIDDEN_SIZE",
    "Backend",
    "BackendChoice",
    "NormAddArguments",
    "add",
    "add_norm",
    "backend_for",
    "choose_backend",
    "gate_scales",
    "gpas",
    "norm",
    "norm_add",
    "norm_add_norm",
    "use_backend",
]
