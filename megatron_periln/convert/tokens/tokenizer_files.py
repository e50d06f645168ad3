"""The files of a tokenizer in a model's folder: copied where they do, or made from what training used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_periln.convert.model_folder import TOKENIZER_FILES
from megatron_periln.convert.tokens import from_sentencepiece, from_tiktoken
from megatron_periln.convert.tokens.json_parts import InexpressibleError
from megatron_periln.convert.tokens.sentencepiece_model import SentencePieceModel
from megatron_periln.convert.tokens.training_tokenizer import Source, TrainingTokenizer, beyond_files

__all__ = ["PLAIN_CLASSES", "Candidate", "candidates"]

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "PreTrainedTokenizer")
"""The classes for which every transformers takes ``tokenizer.json`` as it is, whatever the ``model_type``."""
_CLASS = PLAIN_CLASSES[0]
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_NAMED = ("unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Candidate:
    """A way to write the files.

    Parameters
    ----------
    name
        What it is, for people.
    write
        Writes the files to a folder.
    copied
        It copies files as they are.
    """

    name: str
    write: Callable[[Path], None]
    copied: bool


def candidates(source: Source, longest: int) -> list[Candidate]:
    """Return the ways to write a tokenizer's files, the one that changes least first.

    Parameters
    ----------
    source
        The tokenizer.
    longest
        The length of a sequence, in tokens.
    """
    tokenizer = source.tokenizer
    content = _content(tokenizer)
    found = []
    if source.folder and ((source.folder / "tokenizer.json").is_file() or content is None):
        folder, names = source.folder, _names(tokenizer)
        found.append(
            Candidate(f"tokenizer files of {folder}", lambda output: _copy(folder, output, names), True)
        )
    if content is not None:
        settings = _settings(source, longest)

        def write(output: Path) -> None:
            _remove(output, _names(tokenizer))
            for name, value in (("tokenizer.json", content), ("tokenizer_config.json", settings)):
                (output / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
            if tokenizer.parts.kind == "sentencepiece":  # which llama.cpp reads
                (output / "tokenizer.model").write_bytes(tokenizer.parts.payload)
            for name in _TEMPLATES:
                if source.folder and (source.folder / name).is_file():
                    shutil.copyfile(source.folder / name, output / name)

        found.append(Candidate(f"tokenizer.json of {tokenizer}, as {_CLASS}", write, False))
    return found


def _names(tokenizer: TrainingTokenizer) -> list[str]:
    """Return the names of a tokenizer's files, those included that its class alone has (``spiece.model``)."""
    library = getattr(getattr(tokenizer.built, "_tokenizer", None), "tokenizer", None)
    own = getattr(library, "vocab_files_names", None) or {}
    return list(dict.fromkeys([*TOKENIZER_FILES, *own.values()]))


def _copy(folder: Path, output: Path, names: list[str]) -> None:
    _remove(output, names)
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)


def _remove(output: Path, names: list[str]) -> None:
    for name in names:
        (output / name).unlink(missing_ok=True)


def _content(tokenizer: TrainingTokenizer) -> dict[str, Any] | None:
    """Return what ``tokenizer.json`` holds; None for a tokenizer that is not made of one.

    Raises
    ------
    InexpressibleError
        If it has a rule for which there is nothing.
    """
    parts = tokenizer.parts
    match parts.kind:
        case "tokenizers":
            content = json.loads(parts.payload)
            return content if parts.settings["add_special_tokens"] else {**content, "post_processor": None}
        case "sentencepiece":
            return from_sentencepiece.tokenizer_json(SentencePieceModel.read(parts.payload))
        case "tiktoken":
            settings = parts.settings
            return from_tiktoken.tokenizer_json(
                parts.payload, settings["pattern"], settings["special_tokens"]
            )
    if reason := beyond_files(tokenizer.built) or _at_random(tokenizer.built):
        raise InexpressibleError(reason)
    return None


def _at_random(built: Any) -> str:
    library = getattr(getattr(built, "_tokenizer", None), "tokenizer", None)
    backend = getattr(library, "backend_tokenizer", None)
    if backend is not None and json.loads(backend.to_str())["model"].get("dropout"):
        return "its BPE has dropout, so that the ids of a text are drawn anew each time"
    return ""


def _settings(source: Source, longest: int) -> dict[str, Any]:
    """Return what ``tokenizer_config.json`` holds."""
    tokenizer = source.tokenizer
    tokens = source.training.special_tokens
    settings: dict[str, Any] = {"tokenizer_class": _CLASS}
    for name, number in (("bos", tokens.bos), ("eos", tokens.eos), ("pad", tokens.pad)):
        settings[f"{name}_token"] = source.training.token(number)
    inner = tokenizer.built._tokenizer.tokenizer
    if tokenizer.parts.kind == "tokenizers":
        settings |= {name: str(token) for name in _NAMED if (token := getattr(inner, name, None))}
        if more := [str(token) for token in getattr(inner, "extra_special_tokens", None) or []]:
            settings["additional_special_tokens"] = more
        settings["padding_side"] = inner.padding_side
        as_text = tokenizer.parts.settings["encode_special_tokens"]
    else:
        settings |= {"add_bos_token": False, "add_eos_token": False}
        if unknown := tokenizer.token(_unknown(tokenizer)):
            settings["unk_token"] = unknown
        as_text = tokenizer.parts.kind == "sentencepiece"
    template = getattr(tokenizer.built, "chat_template", None)
    if isinstance(template, str):
        settings["chat_template"] = template
    return {
        **settings,
        "split_special_tokens": as_text,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }


def _unknown(tokenizer: TrainingTokenizer) -> int | None:
    number = getattr(tokenizer.built, "unk_id", None)
    return number if isinstance(number, int) and number >= 0 else None
