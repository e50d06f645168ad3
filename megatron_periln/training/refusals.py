"""What Megatron refuses while a run is set up, in one line; faults of the program keep their traceback.

Megatron checks much of what its flags say only while it builds the model, the optimizer or the data. What it
refuses there it refuses on purpose, by a statement that says so: ``raise`` or ``assert``. An error that comes
of anything else, such as a tensor of another shape, is a fault, and so is any error once training has begun.
"""

from __future__ import annotations

import ast
import importlib.util
import linecache
import re
import textwrap
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import megatron
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_periln.checkpoints.rendezvous import Rendezvous
from megatron_periln.errors import TRACEBACK, RankError, UsageError

__all__ = ["refusals_in_one_line", "why_refused"]

_MEGATRON = tuple(f"{Path(path).resolve()}/" for path in megatron.__path__)
_OURS = f"{Path(__file__).resolve().parents[1]}/"
_STATEMENT = re.compile(r"(?:^|:)\s*(raise|assert)\b")
# What no one raises to refuse a flag: it comes of a mistake in the statement itself.
_MISTAKES = (AttributeError, NameError, LookupError)
# Functions of Megatron's: those that run once everything is set up, and those that only read what users give.
_AFTER_SETUP = {"train", "evaluate", "evaluate_and_print_results"}
_READS_LAYERS = "validate_model_config_args_from_heterogeneous_config"


@contextmanager
def refusals_in_one_line(args: Namespace | None = None) -> Iterator[None]:
    """Turn what Megatron refuses meanwhile into a `UsageError`; every other error goes its way.

    Parameters
    ----------
    args
        Megatron's, parsed, with which the ranks agree on who speaks, for one alone may have met the error;
        None where every rank meets it.

    Raises
    ------
    UsageError
        With what was refused; a `RankError` on a rank that is to speak because the first does not.
    """
    try:
        yield
    except Exception as error:
        reason = None if isinstance(error, UsageError) else why_refused(error)
        if reason is None:
            raise
        alone = args is not None and Rendezvous(args).speaks_for_the_first()
        what = "the checkpoint" if isinstance(error, CheckpointingException) else "these flags"
        message = f"Megatron refuses {what}: {reason}; {TRACEBACK}=1 shows the traceback"
        raise (RankError if alone else UsageError)(message) from error


def why_refused(error: Exception) -> str | None:
    """Return what was refused, and where, in one line; None if ``error`` is no refusal, but a fault.

    Parameters
    ----------
    error
        As it was caught, with its traceback.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    megatrons = {frame.f_code.co_name for frame, _ in frames if _place(frame.f_code.co_filename)}
    if not frames or megatrons & _AFTER_SETUP:
        return None
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        return text
    if isinstance(error, ModuleNotFoundError) and error.name and not _is_installed(error.name):
        return f"the Python package {error.name.partition('.')[0]} is not installed ({text})"
    frame, line = frames[-1]
    path = frame.f_code.co_filename
    if _is_statement_of(error, linecache.getline(path, line)) and _may_refuse(error, path):
        return f"{text or _condition(error.__traceback__)} ({_place(path)}:{line})"
    if _READS_LAYERS in megatrons:
        kind = type(error).__name__
        return f"--heterogeneous-layers-config-path: not such a file as Megatron reads ({kind}: {text})"
    if "validate_args" in megatrons and isinstance(error, AssertionError | ValueError):
        return text or None
    return None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _is_statement_of(error: Exception, source: str) -> bool:
    statement = _STATEMENT.search(source)
    if statement is None:
        return False
    return isinstance(error, AssertionError) if statement[1] == "assert" else not isinstance(error, _MISTAKES)


def _may_refuse(error: Exception, path: str) -> bool:
    """Tell whether an error's statement is one that checks flags: of ours, those that name a wrong value."""
    return _place(path).startswith("megatron/") or (bool(_place(path)) and isinstance(error, ValueError))


def _place(path: str) -> str:
    """Return where a file of Megatron's or ours is from its package on, "" for any other."""
    resolved = str(Path(path).resolve())
    for root in (_OURS, *_MEGATRON):
        if resolved.startswith(root):
            return f"{Path(root).name}/{resolved.removeprefix(root)}"
    return ""


def _condition(trace: TracebackType | None) -> str:
    """Return what an assertion without words asserts."""
    last = traceback.extract_tb(trace)[-1]
    assert last.lineno is not None
    lines = range(last.lineno, (last.end_lineno or last.lineno) + 1)
    source = textwrap.dedent("".join(linecache.getline(last.filename, line) for line in lines))
    try:
        (statement,) = ast.parse(source).body
    except (SyntaxError, ValueError):
        statement = None
    if isinstance(statement, ast.Assert):
        return f"it needs {ast.unparse(statement.test)}"
    return f"it says only `{' '.join(source.split())}`"
