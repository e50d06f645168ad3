"""What is wrong with a command line, found by tables of rules and said together.

To add a rule, put a `Rule` into the table that is read when the arguments it looks at are known (the order is
that of megatron_periln/training/parsing.py):

- ``training/checks.py:AS_PARSED`` and ``training/dropped_flags.py:DROPPED``: what the flags say by
  themselves;
- ``training/refusals/needed.py:NEEDED`` and ``SCHEDULE``, ``training/checks.py:MODEL`` and
  ``training/mask_checks.py:MASKS``: once a checkpoint's arguments are adopted
  (``--use-checkpoint-args``), before Megatron's validation;
- ``training/packages.py:PACKAGES``: packages that flags need and that are not installed;
- ``training/optimizers/emerging.py:EMERGING``: what Muon, SOAP and Lion can't do;
- ``cpu/flags.py:GPU_ONLY``: what ``--device cpu`` has no counterpart of;
- ``training/evaluation_checks.py:EVALUATION`` and ``training/graph_checks.py:GRAPHS``: once Megatron has
  validated and completed the arguments.

A rule that needs more than a predicate and a text is a function that yields the texts of what it finds. Every
rule must bear arguments that another rule has found fault with: only `Rule.instead` says what they would be.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron_periln.errors import UsageError

__all__ = ["Check", "Problems", "Rule", "refuse"]


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong.

    Attributes
    ----------
    broken
        Whether it is, by Megatron's arguments and ours.
    text
        ``FLAG: WHY; WHAT TO GIVE INSTEAD``, in one line; ``{name}`` stands for an argument's value.
    instead
        What the arguments are if one does what the text says, with which the rules after this one, and
        Megatron's validation, go on.
    """

    broken: Callable[[Namespace], object]
    text: str
    instead: Mapping[str, object] = field(default_factory=dict)

    def __call__(self, args: Namespace) -> Iterator[str]:
        """Yield the text if the rule is broken, and correct ``args``."""
        if self.broken(args):
            yield self.text.format_map(vars(args))
            vars(args).update(self.instead)


Check = Callable[[Namespace], Iterable[str]]
"""A `Rule`, or a function that yields what it finds wrong."""


class Problems:
    """What has been found wrong so far.

    Attributes
    ----------
    texts
        One line each.
    final
        Whether one of them leaves nothing for later checks to go by.
    cause
        The error that one of them comes of, for the traceback.
    harmless
        What was given and changes nothing, one line each: told if nothing is wrong.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.final = False
        self.cause: Exception | None = None
        self.harmless: list[str] = []

    def add(self, text: str, *, final: bool = False) -> None:
        """Add one, unless it is there already."""
        if text not in self.texts:
            self.texts.append(text)
        self.final |= final

    def find(self, args: Namespace, rules: Iterable[Check], *, final: bool = False) -> None:
        """Try rules, all of them."""
        for rule in rules:
            for text in rule(args):
                self.add(text, final=final)

    @contextmanager
    def caught(self, *, final: bool = False) -> Iterator[None]:
        """Add what is raised as a `UsageError` inside."""
        try:
            yield
        except UsageError as error:
            self.add(str(error), final=final)

    def refuse(self) -> None:
        """Raise what was found, if anything was.

        Raises
        ------
        UsageError
            With the one thing that is wrong, or a list.
        """
        if len(self.texts) == 1:
            raise UsageError(self.texts[0]) from self.cause
        if self.texts:
            lines = [f"{len(self.texts)} things are wrong with these flags:", *self.texts]
            raise UsageError("\n  ".join(lines)) from self.cause


def refuse(args: Namespace, rules: Sequence[Check]) -> None:
    """Try rules, and raise what they find.

    Raises
    ------
    UsageError
        As `Problems.refuse` does.
    """
    problems = Problems()
    problems.find(args, rules)
    problems.refuse()
