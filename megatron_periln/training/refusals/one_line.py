"""What Megatron refuses or fails at while a run is set up, in one line that names the flags.

Megatron checks much of what its flags say only while it builds the model, the optimizer or the data. What it
refuses there it refuses on purpose, by a statement that says so: ``raise`` or ``assert``. What it does not
check ends in any other error, inside it or what it calls; that is told in one line too, as what it is. Errors
of this package are faults and keep their traceback, and so does any error once training has begun.
"""

from __future__ import annotations

import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import megatron
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_periln.checkpoints.rendezvous import Rendezvous
from megatron_periln.errors import FLAG, RankError, UsageError
from megatron_periln.training.packages import installed
from megatron_periln.training.refusals.statements import Statement, flags_of, names_at, statement_at

__all__ = ["in_words", "one_line", "refusals_in_one_line", "why_refused"]

_MEGATRON = tuple(f"{Path(path).resolve()}/" for path in megatron.__path__)
_OURS = f"{Path(__file__).resolve().parents[2]}/"
_STAND_IN = "megatron_periln/cpu/"  # torch's part under --device cpu
# What no one raises to refuse a flag: it comes of a mistake in the statement itself.
_MISTAKES = (AttributeError, NameError, LookupError)
# Functions of Megatron's: those that run once everything is set up, and those that only read what users give.
_AFTER_SETUP = {"train", "evaluate", "evaluate_and_print_results"}
_READS_LAYERS = "validate_model_config_args_from_heterogeneous_config"
_SHOW = f"{FLAG} shows where"


@contextmanager
def refusals_in_one_line(args: Namespace | None = None) -> Iterator[None]:
    """Turn what Megatron refuses or fails at meanwhile into a `UsageError`; other errors go their way.

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
        message = None if isinstance(error, UsageError) else one_line(error)
        if message is None:
            raise
        alone = args is not None and Rendezvous(args).speaks_for_the_first()
        raise (RankError if alone else UsageError)(message) from error


def one_line(error: Exception) -> str | None:
    """Return what is told of an error, None if it is to keep its traceback."""
    what = "the checkpoint" if isinstance(error, CheckpointingException) else "these flags"
    if (reason := why_refused(error)) is not None:
        return f"Megatron refuses {what}: {reason}; {_SHOW}"
    if (reason := _why_failed(error)) is not None:
        return f"Megatron fails with {what}: {reason}; {_SHOW}"
    return None


def why_refused(error: Exception) -> str | None:
    """Return what was refused, and where, in one line; None if ``error`` is no refusal.

    Parameters
    ----------
    error
        As it was caught, with its traceback.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    megatrons = _functions_of_megatron(frames)
    if not frames or megatrons & _AFTER_SETUP:
        return None
    text = _text(error)
    if isinstance(error, OSError) and error.filename is not None:
        return text
    if isinstance(error, ModuleNotFoundError) and error.name and not installed(error.name.partition(".")[0]):
        return f"the Python package {error.name.partition('.')[0]} is not installed ({text})"
    frame, line = frames[-1]
    path = frame.f_code.co_filename
    statement = statement_at(path, line)
    if statement is not None and _is_statement_of(error, statement) and _may_refuse(error, path):
        return in_words(error, statement, path, line)
    if _READS_LAYERS in megatrons:
        kind = type(error).__name__
        return f"--heterogeneous-layers-config-path: not such a file as Megatron reads ({kind}: {text})"
    if "validate_args" in megatrons and isinstance(error, AssertionError | ValueError):
        return text or None
    return None


def in_words(error: Exception, statement: Statement, path: str, line: int) -> str:
    """Return what a statement of Megatron's refuses, with the flags and the place."""
    text = _text(error) or f"it needs `{statement.condition}`, and says no more"
    flags = flags_of(statement.names, text)
    named = "" if any(flag in text for flag in flags) or not flags else f"{', '.join(flags)}: "
    return f"{named}{text} ({_place(path)}:{line})"


def _why_failed(error: Exception) -> str | None:
    """Return at what Megatron failed before training began, None for faults of ours, and of connections."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if _functions_of_megatron(frames) & _AFTER_SETUP or isinstance(error, torch.distributed.DistError):
        return None
    known = [
        (frame, line)
        for frame, line in frames
        if _place(frame.f_code.co_filename) and not _place(frame.f_code.co_filename).startswith(_STAND_IN)
    ]
    if not known or not _is_of_megatron(known[-1][0]):
        return None
    frame, line = known[-1]
    names = {name for frame, line in known[-3:] for name in names_at(frame.f_code.co_filename, line)}
    flags = flags_of(names, given=True)
    reading = f", reading {', '.join(flags)}" if flags else ""
    kind = type(error).__name__
    return f"{kind}: {_text(error)} ({_place(frame.f_code.co_filename)}:{line}{reading})"


def _text(error: Exception) -> str:
    return " ".join(str(error).split())


def _functions_of_megatron(frames: list[tuple[FrameType, int]]) -> set[str]:
    return {frame.f_code.co_name for frame, _ in frames if _is_of_megatron(frame)}


def _is_of_megatron(frame: FrameType) -> bool:
    return _place(frame.f_code.co_filename).startswith("megatron/")


def _is_statement_of(error: Exception, statement: Statement) -> bool:
    if statement.kind == "assert":
        return isinstance(error, AssertionError)
    return not isinstance(error, _MISTAKES)


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
