"""The flag of checkpoints."""

from __future__ import annotations

from argparse import ArgumentParser

__all__ = ["GROUP", "add_checkpoint_arguments"]

GROUP = "checkpoints"


def add_checkpoint_arguments(parser: ArgumentParser) -> None:
    """Add the group of flags to a parser."""
    group = parser.add_argument_group(title=GROUP)
    group.add_argument(
        "--checkpoint-verify",
        choices=("full", "size", "off"),
        default="full",
        help="save checksums, or sizes alone, and pass over a broken checkpoint for the one before; default: "
        "full, for sums cost little beside writing; size: for checkpoints too large to be read twice",
    )
