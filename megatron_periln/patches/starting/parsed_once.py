"""Megatron's command line is parsed once."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from megatron.training import ft_integration, inprocess_restart

from megatron_periln.patches.registry import changes

__all__ = ["parse_once"]


@changes(
    "megatron.training.ft_integration.arguments",
    "megatron.training.inprocess_restart.arguments",
    why="each builds a parser of its own and parses the command line again, to see whether a flag is given: "
    "0.03 s of every process's start",
    until="patches/test_parsed_once.py::test_upstream_still_parses_the_command_line_for_one_flag",
)
def parse_once(args: Namespace) -> None:
    """Let them see the arguments that are parsed already."""
    parsed: Any = SimpleNamespace(parse_args=lambda ignore_unknown_args=True: args)
    ft_integration.arguments = inprocess_restart.arguments = parsed
