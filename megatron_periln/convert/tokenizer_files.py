"""The tokenizer beside an exported model."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_periln.convert.hf_config import SpecialTokens
from megatron_periln.errors import UsageError

__all__ = ["copy_tokenizer"]

_FILES = (
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
        if kind != "HuggingFaceTokenizer" or not named or not Path(named).is_dir():
            if named:
                reason = f"{named} is no folder here"
            else:
                reason = f"the checkpoint was trained with {kind}" if kind else "the checkpoint names none"
            return SpecialTokens(), f"no tokenizer files: {reason}; --tokenizer FOLDER adds them"
        given = Path(named)
    files = [given / name for name in _FILES if (given / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in files):
        raise UsageError(f"--tokenizer {given} holds no tokenizer.json; give a tokenizer's folder")
    for file in files:
        shutil.copyfile(file, output / file.name)
    tokens = _special_tokens(given)
    return tokens, f"tokenizer files of {given}; end-of-document token {tokens.eos}"


def _special_tokens(folder: Path) -> SpecialTokens:
    config = _json(folder / "tokenizer_config.json")
    added = _json(folder / "tokenizer.json").get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in added}
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
