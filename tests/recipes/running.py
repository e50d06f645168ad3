"""Runs recipes: built by one process that stands for all, or trained by as many as they have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.parallel.jobs import Jobs
from tests.recipes.inputs import make_inputs
from tests.recipes.recipes import Recipe

ALONE = ["tests.recipes.building.alone", "tests.recipes.building.stop_when_built"]


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    codes: list[int]
    log: str
    losses: list[float]

    @property
    def message(self) -> str:
        """The one error that was told, all its lines."""
        lines = self.log.splitlines()
        (first,) = (number for number, line in enumerate(lines) if line.startswith("error:"))
        last = next(
            (n for n, line in enumerate(lines) if n > first and not line.startswith("  ")), len(lines)
        )
        return "\n".join(lines[first:last])


class RecipeRunner:
    """Runs recipes in folders of their own, through a server of ranks, where nothing is fetched."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self.folder = jobs.folder / "recipes"
        make_inputs(self.folder)

    def build(self, recipe: Recipe, *, mended: bool) -> Outcome:
        """Parse, validate and build a recipe in one process."""
        return self._run(recipe, mended, alone=True)

    def train(self, recipe: Recipe) -> Outcome:
        """Train a recipe, with what its message asks for, in its own processes."""
        return self._run(recipe, mended=True, alone=False)

    def _run(self, recipe: Recipe, mended: bool, *, alone: bool) -> Outcome:
        how = f"{'built' if alone else 'trained'}-{'mended' if mended else 'published'}"
        work = self.folder / how / recipe.name
        work.mkdir(parents=True)
        (work / "data").symlink_to(self.folder / "data")
        world = {"WORLD_SIZE": str(recipe.processes)} if alone else {}
        job = self.jobs.submit(
            {
                "folder": str(work),
                "ranks": 1 if alone else recipe.processes,
                "arguments": recipe.mended(work) if mended else recipe.published(work),
                "changes": ["tests.recipes.building.packages_stand_in", *(ALONE if alone else [])],
                "environment": world,
                "timeout": 120,
            }
        )
        return Outcome(job.exit_codes, job.log, _losses(work / "curve.json"))


def _losses(path: Path) -> list[float]:
    return [step["lm loss"] for step in json.loads(path.read_text())] if path.exists() else []
