"""Trains every recipe and writes docs/recipes.md: ``python -m tests.recipes.page [NAME...]``, some minutes.

With names, only these are trained; the others keep what reached.json says of them.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path

from tests.parallel.jobs import Jobs
from tests.recipes.recipes import RECIPES, Recipe
from tests.recipes.running import Outcome, RecipeRunner

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
REACHED = Path(__file__).parent / "reached.json"

HEAD = """# Public recipes

{total} recipes for Megatron that people published in 2025 and 2026: NVIDIA's examples and functional tests,
model zoos, the scripts of published models. Each was tried with `--device cpu --norm-placement peri` in the
kinds of parallelism that it has; its sizes and paths were made small, all other flags kept.
**{trained} train, {published} of them as published**: no flag was taken away. What needs a GPU and changes
nothing in what is computed is turned off on a CPU by the run itself, which lists it when it starts, and
counts as published. {fp8} recipes have FP8 and were given `--without-fp8`, with which they train in bf16.

A recipe that does not train as it stands is refused in one message, before anything is built, that names all
that must go and what to write instead. What the table says was done then, and the recipe trained. Packages
that recipes need are installed, and Weights & Biases' client is a stand-in.

The flags are in [tests/recipes/flags](../tests/recipes/flags), under their sources. The tests beside them
parse, validate and build every recipe, as published and as its message asks for, and train some. This page
is written by `make recipes`. Losses are those of random weights in few steps on few tokens: they show that
training runs, and nothing else.

| recipe | year | ranks | trains | loss of its steps |
| --- | --- | --- | --- | --- |
"""


def page(recipes: dict[str, Recipe], reached: dict[str, list[float]]) -> str:
    """Return the page."""
    trained = [recipes[name] for name, losses in reached.items() if losses]
    head = HEAD.format(
        total=len(recipes),
        trained=len(trained),
        published=sum(recipe.as_published for recipe in trained),
        fp8=sum(bool(recipe.added) for recipe in trained),
    )
    return head + "".join(f"{_row(recipe, reached[name])}\n" for name, recipe in recipes.items())


def _row(recipe: Recipe, losses: list[float]) -> str:
    repository, path = recipe.source.split(" ", 1)
    source = f"[{recipe.name}](../tests/recipes/flags/{recipe.name}.flags): {repository} `{path}`"
    shown = ", ".join(f"{loss:.2f}" for loss in losses) or "-"
    return f"| {source} | {recipe.year} | {recipe.processes} | {_trains(recipe)} | {shown} |"


def _trains(recipe: Recipe) -> str:
    if recipe.stuck:
        return f"no: {recipe.stuck}"
    added = f" with `{' '.join(recipe.added)}`" if recipe.added else ""
    if recipe.as_published:
        return f"as published{added}"
    dropped = ", ".join(f"`{flag}`" for flag in recipe.dropped)
    instead = f", with `{' '.join(recipe.instead)}`" if recipe.instead else ""
    return f"without {dropped}{instead}{added}: {recipe.why}"


def losses_of(outcome: Outcome) -> list[float]:
    """Return the losses of a recipe that has trained.

    Raises
    ------
    AssertionError
        If it has not.
    """
    assert not any(outcome.codes), outcome.log[-3000:]
    assert len(outcome.losses) >= 3, outcome.log[-3000:]
    assert all(map(math.isfinite, outcome.losses)), outcome.losses
    return [round(loss, 3) for loss in outcome.losses]


def main(names: list[str]) -> None:
    """Train recipes, keep what is reached, and write the page."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    reached = json.loads(REACHED.read_text()) if REACHED.exists() else {}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(Path(folder), None)
        runner = RecipeRunner(jobs)
        for name in names or RECIPES:
            try:
                reached[name] = [] if RECIPES[name].stuck else losses_of(runner.train(RECIPES[name]))
                print(name, reached[name], flush=True)
            except AssertionError as error:
                failed.append(name)
                print(f"{name} has not trained: {error}", flush=True)
        jobs.close()
    lines = [f" {json.dumps(name)}: {json.dumps(reached.get(name, []))}" for name in RECIPES]
    REACHED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if failed:
        raise SystemExit(f"{PAGE} is not written, for these have not trained: {', '.join(failed)}")
    PAGE.write_text(page(RECIPES, json.loads(REACHED.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
