"""Muon, SOAP and Lion: which of them train here, and which parameters Muon leaves to another optimizer.

Megatron calls them emerging optimizers (megatron/core/optimizer/emerging_optimizers.py); they are of the
package emerging-optimizers.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from weakref import WeakSet

from megatron.core.optimizer import emerging_optimizers
from torch import nn

from megatron_periln.rules import Check, Rule
from megatron_periln.training.packages import installed

__all__ = ["EMERGING", "describe_shares"]

_NAMES = ("muon", "dist_muon", "adaptive_muon", "soap", "lion")
_MUON = ("muon", "dist_muon", "adaptive_muon")

_described: WeakSet[nn.Module] = WeakSet()


def _scales_in_its_step(args: Namespace) -> bool:
    """Tell whether the package's adaptive Muon wants a scale that Megatron's subclass of it does not set."""
    if args.optimizer != "adaptive_muon" or not installed("emerging_optimizers"):
        return False
    # Of the package, which takes a second to import: only for who asks for it.
    from emerging_optimizers.orthogonalized_optimizers import AdaptiveMuon

    names = emerging_optimizers.TensorParallelAdaptiveMuon.__init__.__code__.co_names
    return hasattr(AdaptiveMuon, "_apply_muon_scale") and "scale_mode" not in names


EMERGING: tuple[Check, ...] = (
    Rule(
        lambda args: args.optimizer in _NAMES and args.fp16,
        "--optimizer {optimizer}: trains in bf16 or fp32; give --bf16 instead of --fp16, or --optimizer adam",
        {"fp16": False, "bf16": True},
    ),
    Rule(
        lambda args: (
            (args.optimizer == "dist_muon" or (args.optimizer in _NAMES and args.use_distributed_optimizer))
            and not args.bf16
        ),
        "--optimizer {optimizer}: its state is distributed in bf16 alone; give --bf16, or drop "
        "--use-distributed-optimizer (and give --optimizer muon for dist_muon)",
        {"use_distributed_optimizer": False},
    ),
    Rule(
        _scales_in_its_step,
        "--optimizer adaptive_muon: the installed emerging-optimizers scales its updates itself, and "
        "megatron-core does not tell it how; give --optimizer muon",
        {"optimizer": "muon"},
    ),
    Rule(
        lambda args: args.optimizer == "soap" and (args.save or args.load),
        "--optimizer soap: megatron-core cannot save its state, whose tensors have other sizes than the "
        "weights; drop --save and --load, or give --optimizer muon or adam",
        {"save": None, "load": None},
    ),
)
"""What is wrong with the optimizers of this module."""


def describe_shares(args: Namespace, model: nn.Module) -> Iterator[str]:
    """Yield, once for a model, which of its parameters Muon trains, and what else is to be known of it.

    ``model`` is a pipeline stage, wrapped or not; each line is about it alone.
    """
    if args.optimizer not in _MUON or model in _described:
        return
    _described.add(model)
    shares: dict[bool, tuple[set[str], list[int]]] = {True: (set(), []), False: (set(), [])}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            names, sizes = shares[not emerging_optimizers._is_nonlinear_or_embedding(parameter)]
            names.add(_short(name))
            sizes.append(parameter.numel())
    for matrix, optimizer in ((True, args.optimizer), (False, args.muon_scalar_optimizer)):
        names, sizes = shares[matrix]
        yield f"{optimizer} trains {sum(sizes):,} numbers of this rank: {', '.join(sorted(names))}"
    if args.tensor_model_parallel_size > 1 and args.muon_tp_mode == "blockwise":
        yield (
            "--muon-tp-mode blockwise: each tensor-parallel rank orthogonalizes its part of a matrix by "
            "itself, and another --tensor-model-parallel-size trains otherwise; with duplicated or "
            "distributed it does not"
        )


def _short(name: str) -> str:
    """Return what tells a parameter's name from those of its layer, ``self_attn_bda.norm`` for one."""
    *modules, last = name.split(".")
    owner = modules[-2:] if modules[-1] == "norm" else modules[-1:]
    return ".".join(owner if last == "weight" else [*owner, last])
