"""What the optimizer of one rank holds: Megatron's own, built on fake tensors, which says its shards."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.training.training import get_megatron_optimizer_config

__all__ = ["MASTER", "MOMENTS", "optimizer_state"]

MASTER, MOMENTS = "master weights", "moments"

_REMAINDER = 2  # bytes: what a bf16 weight lacks to be its fp32 master, Transformer Engine's FusedAdam
_DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def _size(dtype: Any) -> int:
    return dtype.itemsize if isinstance(dtype, torch.dtype) else _DTYPES[str(dtype)]


def optimizer_state(args: Namespace, buildable: Namespace, chunks: Sequence[Any]) -> Counter[str]:
    """Return the bytes of master weights and moments on this rank, wherever they are.

    The step of each parameter, which torch's own optimizers keep as a tensor of four bytes, is not counted.

    Parameters
    ----------
    args
        The run's, as they are for its GPUs.
    buildable
        The same, with what can be built here.
    chunks
        This rank's model; within `chunks.without_memory` and `fake_job.fake_rank`.
    """
    config, overrides = get_megatron_optimizer_config(buildable)
    optimizer = get_megatron_optimizer(
        config, list(chunks), config_overrides=overrides, use_gloo_process_groups=False
    )
    sums: Counter[str] = Counter({MASTER: 0, MOMENTS: 0})
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False) or part.optimizer is None:
            continue
        sums[MASTER] += _elements(_masters(part)) * _master_size(args)
        trained = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        sums[MOMENTS] += _elements(trained) * _moment_size(args, part.optimizer)
    return sums


def _masters(part: Any) -> list[Any]:
    """Return the fp32 copies, or shards of them, of weights in bf16 or fp16."""
    if isinstance(part, DistributedOptimizer):
        groups = part.shard_fp32_from_float16_groups
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        groups = part.fp32_from_float16_groups
    else:
        groups = []
    return [master for group in groups for master in group if master is not None]


def _elements(tensors: Sequence[Any]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _master_size(args: Namespace) -> int:
    if not args.use_precision_aware_optimizer:
        return 4
    remainders = getattr(args, "store_param_remainders", True) and args.bf16
    return _REMAINDER if _size(args.main_params_dtype) == 4 and remainders else _size(args.main_params_dtype)


def _moment_size(args: Namespace, optimizer: Any) -> int:
    """Return the bytes of moments that an element has."""
    if "Adam" in type(optimizer).__name__:
        if args.use_precision_aware_optimizer:
            return _size(args.exp_avg_dtype) + _size(args.exp_avg_sq_dtype)
        return 8
    if args.optimizer == "sgd":
        return 4 if args.sgd_momentum else 0
    return 4  # Muon and its kind keep one
