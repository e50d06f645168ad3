"""Tokenizers that ``--vocab-file`` and ``--merge-file`` describe: their vocabulary, and their merges.

Imports neither torch nor Megatron: whether the files are what they should be is told before either is there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_periln.errors import PreprocessError

__all__ = ["END_OF_TEXT", "KINDS", "check_vocabulary_files", "write_tokenizer_folder"]

END_OF_TEXT = "<|endoftext|>"
"""What GPT-2's tokenizer takes for the end of a document, and has added where its vocabulary lacks it."""


@dataclass(frozen=True)
class _Kind:
    vocabulary: str
    """Name of the vocabulary's file in a folder of transformers."""
    merges: str | None
    """Name of the file of merges; None if this kind has none."""
    settings: Mapping[str, object]
    """``tokenizer_config.json``."""


_GPT2 = {
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "unk_token": END_OF_TEXT,
    "add_prefix_space": False,
}

KINDS: Mapping[str, _Kind] = {
    "GPT2BPETokenizer": _Kind("vocab.json", "merges.txt", {"tokenizer_class": "GPT2Tokenizer", **_GPT2}),
    "BertWordPieceLowerCase": _Kind(
        "vocab.txt", None, {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    ),
    "BertWordPieceCase": _Kind(
        "vocab.txt", None, {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    ),
}
"""Megatron's types of tokenizers that these files describe."""


def check_vocabulary_files(kind: str, vocabulary: str, merges: str | None) -> None:
    """Check that the files are there and hold what they should.

    Parameters
    ----------
    kind
        One of `KINDS`.
    vocabulary, merges
        Their paths.

    Raises
    ------
    PreprocessError
        Naming the flag and the file.
    """
    if KINDS[kind].merges is None:
        _read("--vocab-file", vocabulary)
        return
    if merges is None:
        raise PreprocessError(f"{kind} needs --merge-file beside --vocab-file {vocabulary}; give both")
    try:
        words = json.loads(_read("--vocab-file", vocabulary))
    except ValueError as error:
        raise PreprocessError(f"--vocab-file {vocabulary}: not JSON ({error}); give a vocab.json") from error
    if not isinstance(words, dict) or not all(isinstance(number, int) for number in words.values()):
        raise PreprocessError(
            f"--vocab-file {vocabulary}: not a JSON object of tokens and their ids, as vocab.json is"
        )
    lines = _read("--merge-file", merges).splitlines()
    for number, line in enumerate(lines, start=1):
        parts = line.split(" ")
        if line.startswith("#version") or not line:
            continue
        if len(parts) != 2 or any(part not in words for part in (*parts, "".join(parts))):
            raise PreprocessError(
                f"--merge-file {merges}:{number}: {line[:40]!r} is no merge of two tokens of --vocab-file "
                f"{vocabulary}; give the merges.txt that was made with it"
            )


def _read(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PreprocessError(f"{flag} {path}: cannot be read: {reason}") from error


def write_tokenizer_folder(kind: str, vocabulary: str, merges: str | None, folder: Path) -> None:
    """Write a tokenizer's folder as transformers reads it.

    Parameters
    ----------
    kind
        One of `KINDS`.
    vocabulary, merges
        The paths of its files, which are copied.
    folder
        Which exists.
    """
    names = KINDS[kind]
    shutil.copyfile(vocabulary, folder / names.vocabulary)
    if names.merges is not None and merges is not None:
        shutil.copyfile(merges, folder / names.merges)
    (folder / "tokenizer_config.json").write_text(json.dumps(names.settings, indent=2) + "\n")
