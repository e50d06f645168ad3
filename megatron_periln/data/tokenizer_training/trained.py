"""Tokenizers that were trained, and their files: written whole, and never in place of something else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_periln.data.output_files import prepare_output, writing
from megatron_periln.errors import PreprocessError
from megatron_periln.files import new_folder, replacing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "FOLDER_FILES",
    "HuggingFaceFiles",
    "Measured",
    "SentencePieceModel",
    "Trained",
    "measure",
    "prepare_folder",
    "prepare_model",
]

FOLDER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""The files of a Hugging Face tokenizer's folder."""


@dataclass(frozen=True)
class Measured:
    """How a tokenizer does on a text.

    Parameters
    ----------
    bytes, tokens
        Size of the text in UTF-8, and in tokens.
    pieces, restored
        Number of pieces of text, and of those that decoding restores to the byte.
    """

    bytes: int
    tokens: int
    pieces: int
    restored: int

    def __str__(self) -> str:
        return (
            f"{self.bytes / max(self.tokens, 1):.3f} bytes a token ({self.bytes:,} bytes; "
            f"{self.restored} of {self.pieces} pieces decode to the same text)"
        )


class Trained(Protocol):
    """A tokenizer that was trained."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def eod(self) -> int:
        """Id that Megatron takes for the end-of-document token."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``."""

    def write(self, path: Path) -> None:
        """Write the tokenizer, whole or not at all."""


@dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece model: the content of its file."""

    model: bytes

    @cached_property
    def _processor(self) -> Any:
        import sentencepiece  # one library is needed of the two, and not for --help

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._processor.get_piece_size()

    @property
    def eod(self) -> int:
        """Id that Megatron takes for the end-of-document token."""
        return self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``."""
        return self._processor.decode(ids)

    def write(self, path: Path) -> None:
        """Write the model file."""
        with writing(path, "; nothing was left there"), replacing(path) as (temporary,):
            temporary.write_bytes(self.model)


@dataclass(frozen=True)
class HuggingFaceFiles:
    """A Hugging Face tokenizer: the content of each file of its folder."""

    files: dict[str, str]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer  # as above

        return Tokenizer.from_str(self.files["tokenizer.json"])

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._tokenizer.get_vocab_size()

    @property
    def eod(self) -> int:
        """Id that Megatron takes for the end-of-document token."""
        token = json.loads(self.files["tokenizer_config.json"])["eos_token"]
        return self._tokenizer.get_vocab()[token]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def write(self, path: Path) -> None:
        """Write the folder, in place of an old one."""
        with writing(path), new_folder(path, flag="--output", replace=True) as folder:
            for name, content in self.files.items():
                (folder / name).write_text(content, encoding="utf-8")


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


def measure(tokenizer: Trained, texts: Iterable[bytes]) -> Measured:
    """Encode and decode pieces of text, in UTF-8."""
    size, tokens, restored = 0, 0, []
    for piece in texts:
        text = piece.decode("utf-8")
        ids = tokenizer.encode(text)
        size += len(piece)
        tokens += len(ids)
        restored.append(tokenizer.decode(ids) == text)
    return Measured(size, tokens, len(restored), sum(restored))
