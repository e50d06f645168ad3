"""Megatron's arguments from a list of flags."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

from megatron.training.arguments import add_megatron_arguments, parse_args

__all__ = ["megatron_arguments", "megatron_parser"]


def megatron_parser(add_arguments: Callable[[ArgumentParser], ArgumentParser]) -> ArgumentParser:
    """Return the parser that `megatron_arguments` makes for each call, which takes a tenth of a second."""
    return add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


def megatron_arguments(
    flags: Sequence[str],
    add_arguments: Callable[[ArgumentParser], ArgumentParser] | None = None,
    *,
    ignore_unknown: bool = False,
) -> Namespace:
    """Return Megatron's arguments, parsed but not validated.

    Parameters
    ----------
    flags
        As on the command line, without the program's name.
    add_arguments
        Adds flags to Megatron's parser.
    ignore_unknown
        Skip flags that the parser does not have.
    """
    given = sys.argv
    sys.argv = ["pretrain", *flags]  # the only place that Megatron's parse_args reads flags from
    try:
        return parse_args(add_arguments, ignore_unknown_args=ignore_unknown)
    finally:
        sys.argv = given
