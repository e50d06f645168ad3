"""Files of command-line flags: ``@FILE`` on the command line stands for the flags in FILE."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from megatron_periln.errors import UsageError

__all__ = ["device_of", "expand", "without"]


def expand(arguments: Iterable[str]) -> list[str]:
    """Return ``arguments`` with every ``@FILE`` replaced by the flags in that file.

    A flag file is text: flags separated by white space or newlines, quoted as in a shell, with
    comments from ``#`` to the end of the line. Later flags win over earlier ones, so those after
    ``@FILE`` override it. A flag file may name others, relative to itself.

    Raises
    ------
    UsageError
        If a file can't be read, or its quotes don't match.
    """
    flags: list[str] = []
    for argument in arguments:
        flags.extend(_read(Path(argument[1:]), ()) if argument.startswith("@") else [argument])
    return flags


def device_of(flags: Sequence[str]) -> str:
    """Return the ``--device`` of a pretraining's flags, "cuda" without one; the last one counts."""
    device = "cuda"
    for flag, following in pairwise([*flags, ""]):
        name, assigned, value = flag.partition("=")
        if name == "--device":
            device = value if assigned else following
    return device


def without(flags: Iterable[str], names: Collection[str]) -> list[str]:
    """Return flags without those of some names, and without their values."""
    kept, dropping = [], False
    for word in flags:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in names
        if not dropping:
            kept.append(word)
    return kept


def _read(path: Path, readers: tuple[Path, ...]) -> list[str]:
    if path in readers:
        raise UsageError(f"flag file {path} includes itself, through {readers[-1]}")
    try:
        words = shlex.split(path.read_text(), comments=True)
    except OSError as error:
        raise UsageError(f"flag file {path}: {error.strerror}; give @FILE the path of a text file") from error
    except ValueError as error:
        raise UsageError(f"flag file {path}: {error}; check its quotes") from error
    flags: list[str] = []
    for word in words:
        flags.extend(_read(path.parent / word[1:], (*readers, path)) if word.startswith("@") else [word])
    return flags
