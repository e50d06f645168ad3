"""Public recipes: flags that people published for Megatron, with their sources, sizes and paths shrunk.

Each is a file in flags/: one flag a line, under comments that say

- ``source``, ``year``: repository and path, and when it was last changed;
- ``processes``: how many train it here, with the recipe's kinds of parallelism;
- ``with``: what a user adds under ``--device cpu``;
- ``drop``, ``instead``, ``why``: what must go, what takes its place, and the reason; without these, it trains
  as published;
- ``needs``: the Python package without which it is refused;
- ``stuck``: why it does not train on a CPU at all.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent / "flags"
PLACEHOLDER = "work/"
ALWAYS = ("--device", "cpu", "--norm-placement", "peri")


@dataclass(frozen=True)
class Recipe:
    """One recipe, as its file in flags/ has it."""

    name: str
    source: str
    year: int
    processes: int
    flags: list[str]
    added: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    instead: list[str] = field(default_factory=list)
    why: str = ""
    needs: str = ""
    stuck: str = ""

    @property
    def as_published(self) -> bool:
        """Whether nothing must go."""
        return not (self.dropped or self.instead or self.stuck)

    @property
    def lacks(self) -> bool:
        """Whether a package that it needs is not installed."""
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None

    @property
    def refused(self) -> list[str]:
        """The flags that the message for the published recipe must name."""
        return [*self.dropped, *(word for word in self.added if word.startswith("--"))]

    def published(self, work: Path) -> list[str]:
        """Return the command line as published, with its paths in the folder ``work``."""
        return self._placed(self.flags, work)

    def mended(self, work: Path) -> list[str]:
        """Return it with what the message asks for."""
        kept, keeping = [], True
        for word in self.flags:
            if word.startswith("--"):
                keeping = word.partition("=")[0] not in self.dropped
            kept += [word] * keeping
        return self._placed([*kept, *self.instead, *self.added], work)

    @staticmethod
    def _placed(words: list[str], work: Path) -> list[str]:
        placed = [
            f"{work}/{word.removeprefix(PLACEHOLDER)}" if word.startswith(PLACEHOLDER) else word
            for word in words
        ]
        return [*ALWAYS, *placed]


def read(path: Path) -> Recipe:
    """Read the file of a recipe."""
    text = path.read_text()
    head = dict(re.findall(r"^# ([a-z]+): (.*)$", text, re.MULTILINE))
    return Recipe(
        name=path.stem,
        source=head["source"],
        year=int(head["year"]),
        processes=int(head["processes"]),
        flags=shlex.split(text, comments=True),
        added=head.get("with", "").split(),
        dropped=head.get("drop", "").split(),
        instead=head.get("instead", "").split(),
        why=head.get("why", ""),
        needs=head.get("needs", ""),
        stuck=head.get("stuck", ""),
    )


RECIPES = {path.stem: read(path) for path in sorted(FOLDER.glob("*.flags"))}
