"""The runs that a report compares: found, read, and each with a name and a look of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_periln.errors import ReportError
from megatron_periln.monitor.lines import FILE_NAME
from megatron_periln.monitor.reading import Run, read_run
from megatron_periln.report.colors import PLACEMENT_COLORS

__all__ = ["ReportedRun", "load_runs"]

_NOT_SHOWN = ("learning_rate",)
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run, its name in the report, unique there, and its look: a colour's name and a line style."""

    name: str
    color: str
    dash: str
    run: Run

    @property
    def num_layers(self) -> int:
        """The model's layers: the stream's layer numbers go from 0, the embedding, to this."""
        return int(self.run.header["num_layers"])


def load_runs(paths: Sequence[Path]) -> list[ReportedRun]:
    """Read the runs at ``paths``: each a monitor's file, or a folder that holds one.

    A placement has a colour; runs of one placement differ by their line style.

    Raises
    ------
    UsageError
        For the first that is none.
    """
    files = [_find(path) for path in paths]
    if twice := [file for file, count in Counter(file.resolve() for file in files).items() if count > 1]:
        raise ReportError(f"{twice[0]}: given more than once")
    runs = [_read(file) for file in files]
    reported: list[ReportedRun] = []
    of_color: Counter[str] = Counter()
    for name, run in zip(_names(runs), runs, strict=True):
        placement = run.header["placement"]
        color = placement if placement in PLACEMENT_COLORS else "other"
        dash = _DASHES[of_color[color] % len(_DASHES)]
        reported.append(ReportedRun(name=name, color=color, dash=dash, run=run))
        of_color[color] += 1
    return reported


def _find(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise ReportError(f"{path}: no such file or folder")
        return path
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME
    below = sorted(path.glob(f"*/{FILE_NAME}"))[:4]
    if below:
        hint = f"did you mean {' '.join(str(file.parent) for file in below)}?"
    else:
        hint = "train with --monitor-layers all"
    raise ReportError(f"{path}: a folder without a {FILE_NAME}; {hint}")


def _read(file: Path) -> Run:
    run = read_run(file, without=_NOT_SHOWN)
    header: dict[str, Any] = run.header
    if not isinstance(header.get("placement"), str) or type(header.get("num_layers")) is not int:
        raise ReportError(f"{file}: its line of kind run lacks placement or num_layers")
    if len(run.steps.iteration) == 0:
        raise ReportError(f"{file}: holds no iteration yet")
    return run


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the runs' own names, with the folder where two have the same, with a number if need be."""
    names = [str(run.header.get("name") or run.path.absolute().parent.name) for run in runs]
    for more in (lambda run, _: run.path.absolute().parent.name, lambda _, index: str(index + 1)):
        count = Counter(names)
        names = [
            f"{name} ({more(run, index)})" if count[name] > 1 else name
            for index, (name, run) in enumerate(zip(names, runs, strict=True))
        ]
    return names
