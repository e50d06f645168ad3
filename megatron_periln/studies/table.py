"""What came of a study: one row a run, and one a combination of choices over its seeds."""

from __future__ import annotations

import csv
import io
import json
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_periln.files import write_text
from megatron_periln.monitor.reading import Run
from megatron_periln.studies.measures import MEASURES, depth_profiles, measure
from megatron_periln.studies.run_folder import DONE, RunFolder
from megatron_periln.studies.study import Study

__all__ = ["collect", "markdown", "summarize", "write_results"]

_NAMES = ("validation_loss", *MEASURES)
_LATER = ("effective_depth",)  # which results of earlier versions have not
_IN_MARKDOWN = tuple(name for name in _NAMES if name not in ("training_loss", "gradient_norm", "seconds"))


def collect(study: Study, folders: Sequence[RunFolder], command: str) -> dict[str, Any]:
    """Return the results of a study as far as they are there.

    Returns
    -------
    dict
        ``study``, ``about``, ``command``, ``flags`` of every run; ``made``, the commits and versions that
        occur; ``summary``, one entry a combination; ``runs``, one entry a run, with its status, measures,
        own flags, the index of its ``made``, and those of earlier attempts made of something else
        (``made_before``); ``profiles``, statistics by depth of each run.
    """
    made = _Made()
    runs, profiles = [], []
    for folder in folders:
        state = folder.read()
        record = folder.read_record() if state["status"] in DONE else None
        runs.append(_row(folder, state, record, len(study.flags), made))
        if record is not None:
            of = {"choices": folder.run.choices, "seed": folder.run.seed}
            profiles.append({**of, **depth_profiles(record)})
    return {
        "study": study.name,
        "about": study.about,
        "command": command,
        "flags": shlex.join(study.flags),
        "made": made.list,
        "summary": summarize(runs),
        "runs": runs,
        "profiles": profiles,
    }


def _row(
    folder: RunFolder, state: dict[str, Any], record: Run | None, shared: int, made: _Made
) -> dict[str, Any]:
    """Return what became of a run; its first ``shared`` flags are those of every run."""
    run = folder.run
    row = {"choices": run.choices, "seed": run.seed, "flags": run.flags[shared:]}
    row |= {key: state[key] for key in ("status", "reason", "attempts") if state.get(key)}
    if record is not None:
        row["measures"] = measure(record, folder.log)
    if state["status"] == "pending":
        return row
    last, *before = [made.index(attempt) for attempt in (state, *state.get("earlier", ()))]
    return row | {"made": last} | ({"made_before": before} if before else {})


class _Made:
    """What runs were made of, each once."""

    def __init__(self) -> None:
        self.list: list[dict[str, Any]] = []
        self._indices: dict[str, int] = {}

    def index(self, attempt: dict[str, Any]) -> int:
        """Return the index of what an attempt was made of, which is added if it is new."""
        about = {key: attempt.get(key) for key in ("commit", "versions", "machine")}
        index = self._indices.setdefault(json.dumps(about, sort_keys=True), len(self.list))
        if index == len(self.list):
            self.list.append(about)
        return index


def summarize(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each combination of choices.

    ``mean`` and ``std`` of a measure are over the seeds that finished; those that diverged are counted,
    and so are those that failed or have not run. The standard deviation is the sample's (n - 1), None
    for less than two.
    """
    combinations: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    runs = list(runs)
    had = {name for run in runs for name in run.get("measures") or ()}
    names = [name for name in _NAMES if name in had or name not in _LATER]
    for run in runs:
        combinations.setdefault(tuple(run["choices"].items()), []).append(run)
    return [
        {
            "choices": dict(choices),
            "seeds": len(members),
            "finished": sum(run["status"] == "finished" for run in members),
            "diverged": sum(run["status"] == "diverged" for run in members),
            "missing": sum(run["status"] not in DONE for run in members),
            "measures": {name: _over_seeds(name, members) for name in names},
        }
        for choices, members in combinations.items()
    ]


def _over_seeds(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, float | int | None]:
    values = [run["measures"].get(name) for run in runs if run["status"] == "finished"]
    known = [value for value in values if value is not None]
    return {
        "n": len(known),
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the summary as a table in Markdown: mean ± standard deviation over the seeds."""
    rows = results["summary"]
    axes = list(rows[0]["choices"]) if rows else []
    titles = {"validation_loss": "validation loss"} | {name: each.title for name, each in MEASURES.items()}
    forms = {"validation_loss": ".3f"} | {name: each.form for name, each in MEASURES.items()}
    shown = [name for name in _IN_MARKDOWN if not rows or name in rows[0]["measures"]]
    head = [*axes, "seeds", "diverged", *(titles[name] for name in shown)]
    lines = [f"# {results['study']}", "", results["about"], "", _line(head), _line(["---"] * len(head))]
    for row in rows:
        seeds = f"{row['seeds'] - row['missing']}" + (f" of {row['seeds']}" if row["missing"] else "")
        cells = [_cell(row["measures"][name], forms[name]) for name in shown]
        lines.append(_line([*row["choices"].values(), seeds, str(row["diverged"]), *cells]))
    return "\n".join([*lines, "", f"    {results['command']}", ""])


def _cell(value: dict[str, Any], form: str) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:{form}}" + ("" if value["std"] is None else f" ± {value['std']:{form}}")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _csv(results: dict[str, Any]) -> str:
    """Return the runs as CSV, a line each."""
    axes = list(results["runs"][0]["choices"]) if results["runs"] else []
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*axes, "seed", "status", *_NAMES])
    for run in results["runs"]:
        measures = run.get("measures") or {}
        table.writerow(
            [*run["choices"].values(), run["seed"], run["status"], *(measures.get(name) for name in _NAMES)]
        )
    return text.getvalue()


def _json(results: dict[str, Any]) -> str:
    """Return JSON with a line for each key, and for each entry of a list."""

    def value(item: Any) -> str:
        if isinstance(item, list) and item:
            return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in item) + "\n ]"
        return json.dumps(item)

    return "{\n" + ",\n".join(f' "{key}": {value(item)}' for key, item in results.items()) + "\n}\n"


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """Write ``results.json``, ``results.csv`` and ``results.md``; return the last one's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", _json(results))
    write_text(folder / "results.csv", _csv(results))
    write_text(folder / "results.md", markdown(results))
    return folder / "results.md"
