"""Where trained tokenizers are written: whole, or not at all, and never in place of something else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_periln.data.atomic import prepare_output
from megatron_periln.errors import PreprocessError
from megatron_periln.files import sync

__all__ = ["FOLDER_FILES", "prepare_folder", "prepare_model", "write_folder"]

FOLDER_FILES = ("tokenizer.json", "tokenizer_config.json")


def prepare_folder(path: Path, *, overwrite: bool = False) -> None:
    """Check that a tokenizer's folder can be written, and holds nothing that would be lost.

    Raises
    ------
    PreprocessError
        If it exists and ``overwrite`` is False, or it holds other files than a tokenizer's.
    """
    if path.is_dir() and not any(path.iterdir()):
        overwrite = True
    prepare_output(path, flag="--output", overwrite=overwrite)
    if path.exists():
        if not path.is_dir():
            raise PreprocessError(f"{path}: is a file, not a folder: choose another --output")
        others = sorted({item.name for item in path.iterdir()} - {*FOLDER_FILES})
        if others:
            raise PreprocessError(f"{path}: also holds {others[0]}: choose another --output")


def prepare_model(path: Path, *, overwrite: bool = False) -> None:
    """Check that a tokenizer's model file can be written.

    Raises
    ------
    PreprocessError
        If it is a folder, or exists and ``overwrite`` is False.
    """
    if path.is_dir():
        raise PreprocessError(f"--output {path}: a folder; name a file such as {path / 'tokenizer.model'}")
    prepare_output(path, flag="--output", overwrite=overwrite)


def write_folder(path: Path, files: dict[str, str]) -> None:
    """Write a tokenizer's folder, whole or not at all, in place of an old one.

    Raises
    ------
    PreprocessError
        If it cannot be written.
    """
    new, old = (path.with_name(f"{path.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "old"))
    try:
        new.mkdir()
        for name, content in files.items():
            (new / name).write_text(content, encoding="utf-8")
            sync(new / name)
        sync(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
        sync(path.parent)
    except BaseException as error:
        if old.exists() and not path.exists():
            old.rename(path)
        if isinstance(error, OSError):
            raise PreprocessError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise
    finally:
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)
