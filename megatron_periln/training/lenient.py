"""Parsing that goes on after a flag it can't take, to find all of them."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence

from megatron_periln.errors import UsageError
from megatron_periln.rules import Problems

__all__ = ["parse_leniently"]

_HELP = "--help lists the flags"


def parse_leniently(
    parser: ArgumentParser,
    problems: Problems,
    words: Sequence[str] | None = None,
    namespace: Namespace | None = None,
) -> Namespace:
    """Return what a command line says without what ``parser`` can't take of it.

    Parameters
    ----------
    parser
        Reads it.
    problems
        Gets what it can't take: unknown flags, and wrong values, each of which is left out.
    words, namespace
        As for ``ArgumentParser.parse_args``.
    """
    parser.exit_on_error = False  # a wrong value is raised
    words = list(sys.argv[1:] if words is None else words)
    while True:
        try:
            args, unknown = parser.parse_known_args(words, namespace)
        except ArgumentError as error:
            problems.add(f"{error}; {_HELP}", final=True)
            kept = _without(words, (error.argument_name or "").split("/"))
            if len(kept) == len(words):
                raise UsageError(problems.texts[-1]) from error
            words = kept
            continue
        for flag in _by_flag(unknown):
            problems.add(f"unrecognized arguments: {' '.join(flag)}; {_HELP}")
        return args


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _by_flag(words: Sequence[str]) -> list[list[str]]:
    """Return words in groups: a flag and its values, or values without one."""
    groups: list[list[str]] = []
    for word in words:
        if _is_flag(word) or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def _without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return words without a flag, wherever it stands, and its values."""
    return [word for group in _by_flag(words) if group[0].partition("=")[0] not in options for word in group]
