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
        help="check a checkpoint's checksums before loading it, or its files' sizes alone, and pass over a "
        "broken one for the one before; default: full",
    )
