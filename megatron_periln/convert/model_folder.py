"""The folder of a model of transformers: whether it is one, and the tokenizer's files in it.

Imports neither torch nor Megatron, so that a wrong ``--model`` is told at once.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_periln.errors import UsageError
from megatron_periln.vocabulary_files import (
    END_OF_TEXT,
    KINDS,
    check_vocabulary_files,
    write_tokenizer_folder,
)

__all__ = ["SpecialTokens", "check_model_folder", "copy_tokenizer"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


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


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of a tokenizer's special tokens; None where it has none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    def as_settings(self) -> dict[str, int | None]:
        """Return them under the names that transformers gives them."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def copy_tokenizer(args: Namespace, given: Path | None, output: Path) -> tuple[SpecialTokens, str]:
    """Copy the tokenizer's files to ``output``.

    Parameters
    ----------
    args
        Megatron's saved arguments, which name the tokenizer.
    given
        A folder to take it from instead.
    output
        The exported model's folder.

    Returns
    -------
    tuple
        The ids of its special tokens, and one line that says what was copied.

    Raises
    ------
    UsageError
        If ``given`` holds no tokenizer of transformers.
    """
    kind = getattr(args, "tokenizer_type", None)
    if given is None:
        named = getattr(args, "tokenizer_model", None)
        if kind in KINDS and getattr(args, "vocab_file", None):
            return _write_tokenizer(args, output)
        if kind != "HuggingFaceTokenizer" or not named or not Path(named).is_dir():
            if named:
                reason = f"{named} is no folder here"
            else:
                reason = f"the checkpoint was trained with {kind}" if kind else "the checkpoint names none"
            return SpecialTokens(), f"no tokenizer files: {reason}; --tokenizer FOLDER adds them"
        given = Path(named)
    files = [given / name for name in _TOKENIZER_FILES if (given / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in files):
        raise UsageError(f"--tokenizer {given} holds no tokenizer.json; give a tokenizer's folder")
    for file in files:
        shutil.copyfile(file, output / file.name)
    tokens = _special_tokens(given)
    return tokens, f"tokenizer files of {given}; end-of-document token {tokens.eos}"


def _write_tokenizer(args: Namespace, output: Path) -> tuple[SpecialTokens, str]:
    """Write a tokenizer from the files of its vocabulary and merges, as training built it."""
    files = [name for name in (args.vocab_file, args.merge_file) if name]
    absent = [name for name in files if not Path(name).is_file()]
    if absent or args.special_tokens:
        reason = (
            f"{absent[0]} is no file here" if absent else "it has --tokenizer-special-tokens beside its files"
        )
        return SpecialTokens(), f"no tokenizer files: {reason}; --tokenizer FOLDER adds them"
    check_vocabulary_files(args.tokenizer_type, args.vocab_file, args.merge_file)
    write_tokenizer_folder(args.tokenizer_type, args.vocab_file, args.merge_file, output)
    tokens = _special_tokens(output)
    return tokens, f"{args.tokenizer_type} of {' and '.join(files)}; end-of-document token {tokens.eos}"


def _special_tokens(folder: Path) -> SpecialTokens:
    config = _json(folder / "tokenizer_config.json")
    added = _json(folder / "tokenizer.json").get("added_tokens", [])
    ids: dict[Any, Any] = dict(_json(folder / "vocab.json"))
    if ids:
        ids.setdefault(END_OF_TEXT, len(ids))  # as transformers adds it
    ids |= {token["content"]: token["id"] for token in added}
    ids |= {token["content"]: int(number) for number, token in config.get("added_tokens_decoder", {}).items()}

    def number(name: str) -> int | None:
        token = config.get(f"{name}_token")
        return ids.get(token["content"] if isinstance(token, dict) else token)

    return SpecialTokens(bos=number("bos"), eos=number("eos"), pad=number("pad"))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}
