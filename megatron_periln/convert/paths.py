"""What the command line names, looked at before anything large is imported or read."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from megatron_periln.errors import UsageError
from megatron_periln.files import new_folder

__all__ = ["check_model_folder", "check_output"]


class _NothingWrittenError(Exception):
    pass


def check_output(output: Path) -> None:
    """Find out whether `new_folder` could make ``output``; leave nothing but the folders above it.

    Raises
    ------
    UsageError
        If it couldn't.
    """
    with suppress(_NothingWrittenError), new_folder(output, flag="--output"):
        raise _NothingWrittenError


def check_model_folder(model: Path) -> None:
    """Refuse a ``--model`` that is no folder of a model of transformers.

    Raises
    ------
    UsageError
        If it is none.
    """
    if not model.is_dir():
        raise UsageError(f"--model {model}: no such folder; hub names are not fetched, download it first")
    if not (model / "config.json").is_file():
        raise UsageError(
            f"--model {model} holds no config.json; give the folder of a downloaded or exported model"
        )
