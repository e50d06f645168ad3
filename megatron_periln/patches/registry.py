"""What is changed in Megatron and torch, as data, from which the table in docs/architecture.md is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["PATCHES", "Patch", "changes"]


@dataclass(frozen=True)
class Patch:
    """A function that changes something upstream when it is called.

    Attributes
    ----------
    function
        Makes the change.
    symbols
        What it changes, with its module and class.
    why
        What goes wrong without it, or what it is for.
    until
        The tests, as pytest names them, that fail once upstream no longer needs the change.
    stays
        Why there can be no such test; "" if there is one.
    """

    function: Callable[..., Any]
    symbols: tuple[str, ...]
    why: str
    until: tuple[str, ...]
    stays: str

    @property
    def file(self) -> str:
        """The file of the function, within the package."""
        return self.function.__module__.removeprefix("megatron_periln.").replace(".", "/") + ".py"


PATCHES: list[Patch] = []
"""Those of all modules that have been imported so far."""


def changes[F: Callable[..., Any]](
    *symbols: str, why: str, until: str | tuple[str, ...] = (), stays: str = ""
) -> Callable[[F], F]:
    """Describe the function that follows, which changes ``symbols``; see `Patch`.

    Tests in ``until`` are named from tests/ on: ``patches/test_fixes.py::test_upstream_...``.
    """
    tests = (until,) if isinstance(until, str) else until

    def register(function: F) -> F:
        PATCHES.append(Patch(function, symbols, why, tuple(f"tests/{test}" for test in tests), stays))
        return function

    return register
