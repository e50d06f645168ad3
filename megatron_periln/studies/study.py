"""A study as declared in YAML: flags that all runs share, and the choices that make them differ."""

from __future__ import annotations

import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_periln import flag_files
from megatron_periln.errors import UsageError

__all__ = ["Study", "StudyRun", "read_study"]

_KEYS = ("about", "flags", "grid", "seeds", "ranks", "save", "diverged-above")
_OWN_FLAGS = ("--seed", "--monitor-file", "--save", "--load")


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One training run of a study.

    Parameters
    ----------
    name
        Its folder's name.
    choices
        What it takes of each axis of the grid.
    seed
        The value of ``--seed``.
    flags
        The command line, without what the runner adds for the folder.
    """

    name: str
    choices: dict[str, str]
    seed: int
    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a study's file says.

    Parameters
    ----------
    name
        The file's, without its ending.
    about
        What the study asks, for readers.
    flags
        Of every run.
    grid
        For each axis, its choices and the flags that each stands for.
    seeds
        Every combination runs with each; tables are over them.
    ranks
        Processes of one run.
    save
        Whether runs save checkpoints, and resume from them.
    diverged_above
        A run that ends with a higher loss counts as diverged; None: only one that is not finite does.
    """

    name: str
    about: str
    flags: tuple[str, ...]
    grid: dict[str, dict[str, tuple[str, ...]]]
    seeds: tuple[int, ...]
    ranks: int
    save: bool
    diverged_above: float | None

    def runs(self) -> list[StudyRun]:
        """Return all runs: every combination with the first seed, then with the next."""
        axes = [[(axis, *choice) for choice in choices.items()] for axis, choices in self.grid.items()]
        runs = []
        for seed, taken in itertools.product(self.seeds, itertools.product(*axes)):
            flags = [flag for _, _, flags in taken for flag in flags]
            parts = [choice if f"--{axis}" not in flags else f"{axis}={choice}" for axis, choice, _ in taken]
            runs.append(
                StudyRun(
                    name=re.sub(r"[^\w.=+,-]+", "-", ",".join([*parts, f"seed={seed}"])),
                    choices={axis: choice for axis, choice, _ in taken},
                    seed=seed,
                    flags=(*self.flags, *flags, "--seed", str(seed)),
                )
            )
        return runs


class _Loader(yaml.BaseLoader):
    """Leaves scalars as they are written, ``4e-3`` and ``on`` alike, and takes a key only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(str(key.value) for key, _ in node.value)
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_study(path: Path, more_flags: Sequence[str] = ()) -> Study:
    """Read a study's file.

    ``@FILE`` in its flags is relative to it; paths of data are relative to the working directory.

    Parameters
    ----------
    path
        A YAML file with the keys ``about``, ``flags``, ``grid``, ``seeds``, ``ranks``, ``save`` and
        ``diverged-above``. An axis of the grid is a list of values of the flag it is named after, or a
        mapping from names to flags.
    more_flags
        Flags that follow those of the file in every run.

    Raises
    ------
    UsageError
        If it can't be read, or says something that no study says.
    """
    try:
        content = yaml.load(path.read_text(), Loader=_Loader)  # a subclass of the BaseLoader: text alone
    except OSError as error:
        raise UsageError(f"study {path}: {error.strerror}; give the path of a YAML file") from error
    except yaml.YAMLError as error:
        raise UsageError(f"study {path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        return _study(path, content, more_flags)
    except _MistakeError as mistake:
        raise UsageError(f"study {path}: {mistake}") from mistake


class _MistakeError(Exception):
    """What is wrong in a file whose name the caller knows."""


def _study(path: Path, content: Any, more_flags: Sequence[str]) -> Study:
    if not isinstance(content, Mapping):
        raise _MistakeError(f"holds no keys; a study has {', '.join(_KEYS)}")
    if unknown := [key for key in content if key not in _KEYS]:
        raise _MistakeError(f"unknown key {unknown[0]!r}; a study has {', '.join(_KEYS)}")
    if "flags" not in content:
        raise _MistakeError("has no flags, those of every run; add a key flags")
    seeds = content.get("seeds", ["1234"])
    study = Study(
        name=path.stem,
        about=str(content.get("about", "")).strip(),
        flags=(*_flags("flags", content["flags"], path.parent), *more_flags),
        grid=_grid(content.get("grid", {}), path.parent),
        seeds=tuple(_number("seeds", seed, int) for seed in (seeds if isinstance(seeds, list) else [seeds])),
        ranks=_number("ranks", content.get("ranks", "1"), int),
        save=_boolean("save", content.get("save", "false")),
        diverged_above=_number("diverged-above", content["diverged-above"], float)
        if "diverged-above" in content
        else None,
    )
    _check(study)
    return study


def _check(study: Study) -> None:
    if study.ranks < 1:
        raise _MistakeError(f"ranks is {study.ranks}; a run has at least one process")
    if not study.seeds:
        raise _MistakeError("seeds is empty; give at least one")
    names = Counter(run.name for run in study.runs())
    if twice := [name for name, count in names.items() if count > 1]:
        raise _MistakeError(f"two runs would be called {twice[0]}; give seeds and choices names that differ")
    flags = {flag.partition("=")[0] for run in study.runs() for flag in run.flags[:-2]}
    if own := [flag for flag in _OWN_FLAGS if flag in flags]:
        instead = "the key seeds" if own[0] == "--seed" else "--output for the folder of all runs"
        raise _MistakeError(f"{own[0]} differs from run to run; drop it and use {instead}")


def _grid(content: Any, folder: Path) -> dict[str, dict[str, tuple[str, ...]]]:
    if content == "":
        return {}
    if not isinstance(content, Mapping):
        raise _MistakeError("grid is a mapping from axes to their choices")
    grid = {}
    for axis, choices in content.items():
        if isinstance(choices, Mapping) and choices:
            grid[axis] = {name: _flags(f"{axis}: {name}", flags, folder) for name, flags in choices.items()}
        elif isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            if len(set(choices)) < len(choices):
                raise _MistakeError(f"grid: {axis} has a value twice")
            grid[axis] = {choice: (f"--{axis}", choice) for choice in choices}
        else:
            raise _MistakeError(
                f"grid: {axis} needs a list of values for --{axis}, or a mapping from names to flags"
            )
    return grid


def _flags(where: str, text: Any, folder: Path) -> tuple[str, ...]:
    if not isinstance(text, str):
        raise _MistakeError(f"{where}: flags are text, as on a command line")
    try:
        words: Iterable[str] = shlex.split(text, comments=True)
    except ValueError as error:
        raise _MistakeError(f"{where}: {error}; check its quotes") from error
    return tuple(
        flag_files.expand(f"@{folder / word[1:]}" if word.startswith("@") else word for word in words)
    )


def _boolean(key: str, text: Any) -> bool:
    if text not in ("true", "false"):
        raise _MistakeError(f"{key} is true or false, not {text!r}")
    return bool(text == "true")


def _number(key: str, text: Any, kind: type) -> Any:
    try:
        return kind(text)
    except (TypeError, ValueError) as error:
        raise _MistakeError(f"{key}: {text!r} is no {kind.__name__}") from error
