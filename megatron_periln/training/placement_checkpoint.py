"""The norm placement of a checkpoint against that of a run."""

from __future__ import annotations

from argparse import Namespace

from megatron_periln.errors import UsageError
from megatron_periln.models.saved import STOCK_PLACEMENT, placement_of, saved_arguments
from megatron_periln.norms import NormPlacement

__all__ = ["adopt_saved_placement", "refuse_other_placement"]


def adopt_saved_placement(args: Namespace, load_arg: str) -> None:
    """Set the placement arguments to the checkpoint's, as ``--use-checkpoint-args`` does for Megatron's."""
    saved = saved_arguments(args, load_arg)
    if saved is None:
        return
    for name, stock in STOCK_PLACEMENT.items():
        setattr(args, name, getattr(saved, name, stock))


def refuse_other_placement(args: Namespace, placement: NormPlacement) -> None:
    """Refuse to load a checkpoint whose norms stand elsewhere.

    Raises
    ------
    UsageError
        Naming both placements. Megatron would drop or leave uninitialized the norms that only one
        of them has.
    """
    for load_arg in ("load", "pretrained_checkpoint"):
        saved = saved_arguments(args, load_arg)
        if saved is None:
            continue
        theirs = placement_of(saved)
        if theirs.structure() == placement.structure():
            continue
        origin = "" if hasattr(saved, "norm_placement") else ", written by stock Megatron,"
        warm = "; tools/warm_start.py makes a start of Peri-LN from it" if theirs.name == "pre" else ""
        embedding = "--embedding-norm" if theirs.embedding else "--no-embedding-norm"
        raise UsageError(
            f"the checkpoint in {getattr(args, load_arg)}{origin} has norm placement {theirs.structure()}, "
            f"and this run asks for {placement.structure()}; give --norm-placement {theirs.name} {embedding} "
            f"to continue it, or another --{load_arg.replace('_', '-')} (and --save) to start anew{warm}"
        )
