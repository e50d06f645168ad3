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
        help="save checksums with a checkpoint and check them before loading; size: only check that every "
        "file is there and as long as it was; off: neither. A broken checkpoint is passed over for the one "
        "before. default: full, because sums cost little beside writing, and all ranks share the reading; "
        "size is for checkpoints so large that reading them twice delays the start",
    )
