"""How large a checkpoint is, and how long it takes to write."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

__all__ = ["Checkpoint", "bytes_per_parameter"]

_FP32 = 4


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the run.

    Attributes
    ----------
    parameters
        Of the whole model.
    bytes
        Weights and optimizer, each parameter once, as ``torch_dist`` saves them.
    bandwidth
        Bytes/s that all ranks together write.
    """

    parameters: int
    bytes: int
    bandwidth: float

    @property
    def seconds(self) -> float:
        """How long it takes to write."""
        return self.bytes / self.bandwidth


def bytes_per_parameter(args: Namespace) -> int:
    """Return what validated arguments save of each parameter: its weight, its fp32 master, Adam's moments."""
    weight = int(args.params_dtype.itemsize)
    if args.no_save_optim:
        return weight
    if args.use_precision_aware_optimizer:
        dtypes = (args.main_params_dtype, args.exp_avg_dtype, args.exp_avg_sq_dtype)
        return weight + sum(dtype.itemsize for dtype in dtypes)
    has_master = weight < _FP32 or args.use_distributed_optimizer
    return weight + 2 * _FP32 + (_FP32 if has_master else 0)
