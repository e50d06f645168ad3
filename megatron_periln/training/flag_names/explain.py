"""What a flag that is unknown may have been."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_periln.training.flag_names.forks import FORKS, NO_NEED
from megatron_periln.training.flag_names.upstream import NEWER, UPSTREAM

__all__ = ["Former", "close_spelling", "find_former"]


@dataclass(frozen=True)
class Former:
    """A flag, or a value of one, of another Megatron.

    Attributes
    ----------
    given
        The words on the command line.
    owners
        Who has it, or had it until when.
    advice
        What to do.
    instead
        The words that mean the same here; None if there are none, or if it can be dropped.
    harmless
        Whether a run without it computes the same: it is accepted, and said to change nothing.
    """

    given: tuple[str, ...]
    owners: str
    advice: str
    instead: tuple[str, ...] | None
    harmless: bool = False

    @property
    def meaning(self) -> str:
        """Whose it is, and what to do."""
        return f"{self.owners}; {self.advice}"

    def __str__(self) -> str:
        return f"{' '.join(self.given)}: {self.meaning}"


def _tables() -> Iterable[tuple[str, dict[str, str]]]:
    for version, flags in UPSTREAM.items():
        yield (
            (f"of Megatron until {version}" if version[-1].isdigit() else f"of Megatron on {version}"),
            flags,
        )
    yield "of Megatron newer than core 0.19", NEWER
    for fork, flags in FORKS.items():
        yield f"of {fork}", flags


def find_former(words: Sequence[str]) -> Former | None:
    """Return what a flag with its values was in another Megatron; None if none is known that had it.

    Parameters
    ----------
    words
        As on the command line; a value may stand behind ``=``.
    """
    flag, _, value = words[0].partition("=")
    values = (*((value,) if value else ()), *words[1:])
    found: list[tuple[str, str]] = []
    for key in (" ".join((flag, *values)), flag):
        found = [(owner, table[name]) for owner, table in _tables() if (name := _name(table, key))]
        if found:
            break
    else:
        return None
    owners = [owner if number == 0 else owner.removeprefix("of ") for number, (owner, _) in enumerate(found)]
    advice = found[0][1]
    instead = None
    if advice.startswith("--") and ";" not in advice and _is_words(advice):
        instead = tuple(advice.split())
        if len(instead) == 1 and key == flag:
            instead += values
        advice = f"give {' '.join(instead)}"
    harmless = advice in ("", NO_NEED)
    told = advice or "it changes nothing here"
    return Former(tuple(words), " and ".join(owners), told, instead, harmless)


def _is_words(advice: str) -> bool:
    """Tell whether an advice is a flag, or a flag and its value."""
    return len(advice.split()) <= 2


def _name(table: dict[str, str], key: str) -> str | None:
    if key in table:
        return key
    return next((name for name in table if name[-1] == "*" and key.startswith(name[:-1])), None)


def close_spelling(flag: str, known: Sequence[str]) -> str | None:
    """Return the known flag that is meant by one of nearly its spelling."""
    hyphens = flag.replace("_", "-")
    for option in known:
        if option.replace("_", "-") == hyphens:
            return option
    return next(iter(difflib.get_close_matches(hyphens, known, n=1, cutoff=0.8)), None)
