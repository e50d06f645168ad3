"""``--norm-backend``: who computes the norms of a training run."""

from __future__ import annotations

from argparse import Namespace

import torch

from megatron_periln import cpu
from megatron_periln.errors import RankError, UsageError
from megatron_periln.norms import kernels
from megatron_periln.norms.arguments import placement_of
from megatron_periln.norms.kernels.self_test import find_failure
from megatron_periln.norms.placement import NormPlacement

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
        If the backend asked for can't serve on this device or at this hidden size; on whichever rank, if
        Triton's kernels don't compute there what they should.
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
    if choice.backend.name == "triton" and placement_of(args).output:
        _self_test(args, choice.backend)
    if args.rank == 0:
        print(f"norm backend: {choice}", flush=True)
        if choice.backend.name == "triton" and (placement := placement_of(args)).learned:
            print(f"learned scales: {_who_learns(placement)}", flush=True)


def _who_learns(placement: NormPlacement) -> str:
    """Say whether the Triton kernels compute a placement's learned scales, or PyTorch beside them."""
    if placement.learned == "gpas":
        return "not in the Triton kernels, as gpas acts on the sum"
    if placement.output is False:
        return "not in the Triton kernels, which are those of output norms"
    return f"in the Triton kernels{'' if placement.output is True else ' where output norms stand'}"


def _self_test(args: Namespace, backend: kernels.Backend) -> None:
    """Refuse kernels that the Triton and the GPU of this rank get wrong, before they train a model."""
    device = torch.device("cpu")
    if not cpu.is_active():
        device = torch.device("cuda", args.local_rank % torch.cuda.device_count())
    placement = placement_of(args)
    centered = placement.norms.output.zero_centered
    failure = find_failure(
        backend,
        device,
        args.hidden_size,
        args.params_dtype,
        torch.float32 if args.fp32_residual_connection else args.params_dtype,
        layer_norm=args.normalization == "LayerNorm",
        zero_centered_gamma=args.layernorm_zero_centered_gamma if centered is None else centered,
        with_next=args.fuse_pre_mlp_norm,
        scaled=(placement.residual_scale, placement.output_scale) != (1.0, 1.0),
        learned=placement.learned,
    )
    if failure is not None:
        raise RankError(
            f"rank {args.rank}, norm backend 'triton' {failure}; give --norm-backend compile, or torch, and "
            "please report it"
        )
