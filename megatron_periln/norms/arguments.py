"""From the command line, or a checkpoint's saved arguments, to a `NormPlacement`, and back."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Collection
from typing import Any

from megatron_periln.errors import UsageError
from megatron_periln.norms.kernels import BACKENDS, MAX_NORM_ADD_NORM_HIDDEN_SIZE
from megatron_periln.norms.placement import PLACEMENTS, NormPlacement

__all__ = [
    "GROUP",
    "add_norm_arguments",
    "placement_flags",
    "placement_of",
    "set_placement",
    "why_norms_stay_apart",
]

GROUP = "norm placement"

# A placement's arguments, and what they are in stock Megatron, whose checkpoints have none of them.
_STOCK: dict[str, Any] = {
    "norm_placement": "pre",
    "embedding_norm": False,
    "output_norm_init": "ones",
    "freeze_output_norm": False,
    "output_norm_epsilon": None,
}


def add_norm_arguments(parser: ArgumentParser) -> None:
    """Add the norms' group of flags to a parser."""
    group = parser.add_argument_group(title=GROUP)
    group.add_argument(
        "--norm-placement",
        choices=tuple(PLACEMENTS),
        default="peri",
        help="where norms stand around each sublayer M: pre x+M(N(x)), post N(x+M(x)), peri x+N(M(N(x))), "
        "output x+N(M(x)); default: peri",
    )
    group.add_argument(
        "--embedding-norm",
        action=BooleanOptionalAction,
        default=None,
        help="normalize the embedding; default: for peri and output",
    )
    group.add_argument(
        "--output-norm-init",
        choices=("ones", "depth-scaled"),
        default="ones",
        help="start at 1, or at 1/sqrt(num_layers); default: ones",
    )
    group.add_argument(
        "--freeze-output-norm", action="store_true", help="keep output norms' weights at their start"
    )
    group.add_argument(
        "--output-norm-epsilon", type=float, default=None, help="default: that of --norm-epsilon"
    )
    group.add_argument(
        "--norm-backend",
        choices=BACKENDS,
        default="auto",
        help="Triton kernels, torch.compile or torch; default: auto",
    )
    group.add_argument(
        "--fuse-pre-mlp-norm",
        action="store_true",
        help="peri: attention's output norm and the MLP's input norm as one kernel, up to hidden size "
        f"{MAX_NORM_ADD_NORM_HIDDEN_SIZE}",
    )


def placement_of(args: Namespace) -> NormPlacement:
    """Return the placement that ``args`` ask for, parsed or saved; stock Megatron's ask for Pre-LN.

    Raises
    ------
    UsageError
        If they contradict each other.
    """
    name, embedding, init, freeze, epsilon = (getattr(args, name, stock) for name, stock in _STOCK.items())
    try:
        return NormPlacement.named(name).with_options(
            embedding=embedding, output_norm_init=init, freeze_output_norm=freeze, output_norm_epsilon=epsilon
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def set_placement(args: Namespace, placement: NormPlacement) -> None:
    """Make ``args`` ask for ``placement``."""
    args.norm_placement = placement.name
    args.embedding_norm = placement.embedding
    args.output_norm_init = placement.output_norm_init
    args.freeze_output_norm = placement.freeze_output_norm
    args.output_norm_epsilon = placement.output_norm_epsilon


def placement_flags(placement: NormPlacement) -> list[list[str]]:
    """Return the flags for where a placement's norms stand, each with its value; not for its options."""
    embedding = "--embedding-norm" if placement.embedding else "--no-embedding-norm"
    return [["--norm-placement", placement.name], [embedding]]


def why_norms_stay_apart(
    placement: NormPlacement,
    *,
    whole_layers: bool,
    recomputed: Collection[str],
    offloaded: Collection[str],
    hidden_size: int | None = None,
) -> str | None:
    """Return why attention's output norm and the MLP's input norm can't be one kernel, None if they can.

    Parameters
    ----------
    placement
        Where the norms stand.
    whole_layers
        Whether every layer has attention and an MLP.
    recomputed, offloaded
        Megatron's ``recompute_modules`` and ``offload_modules``, as far as they are in force.
    hidden_size
        None if the kernels are to see to it, of which only Triton's have a limit.
    """
    reasons = {
        f"--norm-placement {placement.name} has not both norms": not (placement.input and placement.output),
        "--hybrid-layer-pattern has no layers of attention and MLP": not whole_layers,
        "--recompute-modules layernorm recomputes that norm alone": "layernorm" in recomputed,
        "--offload-modules mlp_norm offloads that norm alone": "mlp_norm" in offloaded,
        f"--hidden-size {hidden_size} is beyond the {MAX_NORM_ADD_NORM_HIDDEN_SIZE} of its kernel": (
            hidden_size is not None and hidden_size > MAX_NORM_ADD_NORM_HIDDEN_SIZE
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            return f"--fuse-pre-mlp-norm: {reason}; drop one of them"
    return None
