"""Where trained tokenizers are written: whole, or not at all, and never in place of something else."""

from __future__ import annotations

from pathlib import Path

from megatron_periln.data.output_files import prepare_output, writing
from megatron_periln.errors import PreprocessError
from megatron_periln.files import new_folder

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
    UsageError
        If it cannot be written.
    """
    with writing(path), new_folder(path, flag="--output", replace=True) as folder:
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
