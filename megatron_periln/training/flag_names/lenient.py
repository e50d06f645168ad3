"""Parsing that goes on after a flag it can't take, to find all of them.

It goes on with what a flag is called here, if it is one that another Megatron had: what else is wrong is then
found as it will be once the flag is called so.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence

from megatron_periln.errors import UsageError
from megatron_periln.rules import Problems
from megatron_periln.training.flag_names.explain import Former, close_spelling, find_former

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
        Gets what it can't take: unknown flags, and wrong values. Each is left out, or replaced by what it is
        called here. Flags of another Megatron's that change nothing here are left out, and are no problem.
    words, namespace
        As for ``ArgumentParser.parse_args``.
    """
    parser.exit_on_error = False  # a wrong value is raised
    words = list(sys.argv[1:] if words is None else words)
    while True:
        try:
            args, unknown = parser.parse_known_args(words, namespace)
        except ArgumentError as error:
            words = _without_wrong_value(words, error, parser, problems)
            continue
        formers = []
        for flag in _by_flag(unknown):
            if former := find_former(flag):
                formers.append(former)
            else:
                _suggest(flag, parser, problems)
        _explain(formers, problems)
        if not any(former.instead for former in formers):
            return args
        gone = [list(former.given) for former in formers]
        words = [word for flag in _by_flag(words) if flag not in gone for word in flag]
        words += [word for former in formers for word in former.instead or ()]


def _explain(formers: Sequence[Former], problems: Problems) -> None:
    """Say what flags are in another Megatron, those together of which the same is to be said."""
    together: dict[str, list[str]] = {}
    for former in formers:
        if former.harmless:
            problems.harmless.append(str(former))
        else:
            together.setdefault(former.meaning, []).append(" ".join(former.given))
    for meaning, given in together.items():
        problems.add(f"unrecognized arguments: {', '.join(given)}: {meaning}")


def _suggest(flag: list[str], parser: ArgumentParser, problems: Problems) -> None:
    """Say which flag may be meant by one that is unknown."""
    known = [option for action in parser._actions for option in action.option_strings]
    near = close_spelling(flag[0].partition("=")[0], known)
    meant = f"did you mean {near}? " if near else ""
    problems.add(f"unrecognized arguments: {' '.join(flag)}; {meant}{_HELP}")


def _without_wrong_value(
    words: list[str], error: ArgumentError, parser: ArgumentParser, problems: Problems
) -> list[str]:
    """Return words without a flag that has a value that it can't take, or with the one that it means here.

    Raises
    ------
    UsageError
        If the flag is not among them.
    """
    options = (error.argument_name or "").split("/")
    given = [flag for flag in _by_flag(words) if flag[0].partition("=")[0] in options]
    former = next((found for flag in given if len(flag) < 3 and (found := find_former(flag))), None)
    if former is not None:
        problems.add(str(former))
    else:
        problems.add(f"{error}; {_HELP}", final=_has_no_default(parser, options))
        if not given:
            raise UsageError(problems.texts[-1]) from error
    return [*_without(words, options), *((former and former.instead) or ())]


def _has_no_default(parser: ArgumentParser, options: Sequence[str]) -> bool:
    """Tell whether a number is missing without the flag, such as the number of layers."""
    actions = [action for action in parser._actions if set(options) & set(action.option_strings)]
    return any(action.default is None and action.type in (int, float) for action in actions)


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
