"""``--norm-backend``: who computes the norms of a training run."""

from __future__ import annotations

from argparse import Namespace

from megatron_periln import cpu
from megatron_periln.errors import UsageError
from megatron_periln.norms import kernels

__all__ = ["choose_norm_backend"]


def choose_norm_backend(args: Namespace) -> None:
    """Make ``args.norm_backend`` the norms' backend; rank 0 tells which it is and why.

    Parameters
    ----------
    args
        Megatron's validated arguments and ours.

    Raises
    ------
    UsageError
        If the backend asked for can't serve on this device or at this hidden size.
    """
    if args.norm_backend == "compile" and cpu.is_active():
        raise UsageError(
            "norm backend 'compile': torch.compile is off under --device cpu; choose auto or torch"
        )
    device_type = "cpu" if cpu.is_active() else "cuda"
    try:
        choice = kernels.choose_backend(args.norm_backend, device_type, args.hidden_size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    kernels.use_backend(args.norm_backend)
    if args.rank == 0:
        print(f"norm backend: {choice}", flush=True)
