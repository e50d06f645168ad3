"""The gigatoken library, many times as fast as the libraries it reimplements, where it is exact."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_periln.data.tokenizers.encoders.base import Encoded, EncoderUnavailableError
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer

__all__ = [
    "AWKWARD",
    "TIKTOKEN_SCHEMES",
    "GigatokenEncoder",
    "convert_sentencepiece",
    "template_ids",
    "unsupported_reason",
]

TIKTOKEN_SCHEMES = {
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "nemotron"
}
"""Gigatoken's name of the way of splitting words that each pattern of Megatron's describes."""
_REASON = b'{"reason": '


class GigatokenEncoder:
    """Encodes with gigatoken on the calling thread, so that a process may fork at any time.

    Raises
    ------
    EncoderUnavailableError
        If gigatoken is missing or is known not to be exact for the tokenizer.
    """

    name = "gigatoken"

    def __init__(self, resolved: ResolvedTokenizer) -> None:
        try:
            from gigatoken import gigatoken_rs  # optional, and 15 ms of every start
        except ImportError as error:
            raise EncoderUnavailableError("it is not installed: pip install gigatoken") from error
        self._prefix: list[int] = []
        self._suffix: list[int] = []
        self._ranks_and_shift: tuple[int, int] | None = None
        try:
            with _panics_unseen():
                self._backend: Any = getattr(self, f"_open_{resolved.kind}")(gigatoken_rs, resolved)
        except (EncoderUnavailableError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            raise EncoderUnavailableError(_first_line(error)) from error

    def load(self) -> None:
        """Do nothing: it was loaded when it was made."""

    def encode(self, texts: list[str]) -> Encoded:
        """Return the token ids of ``texts``."""
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        ids, lengths = _encode_flat(self._backend, texts)
        if self._ranks_and_shift:
            ids = _special_first(ids, *self._ranks_and_shift)
        if self._prefix or self._suffix:
            ids, lengths = self._wrap(ids, lengths)
        return ids, lengths

    def _wrap(self, ids: NDArray[np.uint32], lengths: NDArray[np.int64]) -> Encoded:
        before, after = len(self._prefix), len(self._suffix)
        wrapped = lengths + before + after
        ends = np.cumsum(wrapped)
        result = np.empty(len(ids) + len(lengths) * (before + after), np.uint32)
        inside = np.ones(len(result), bool)
        for offset, token in enumerate(self._prefix):
            result[ends - wrapped + offset] = token
            inside[ends - wrapped + offset] = False
        for offset, token in enumerate(reversed(self._suffix), 1):
            result[ends - offset] = token
            inside[ends - offset] = False
        result[inside] = ids
        return result, wrapped

    def _open_tokenizers(self, library: Any, resolved: ResolvedTokenizer) -> Any:
        if resolved.settings["unsupported"]:
            raise EncoderUnavailableError(resolved.settings["unsupported"])
        if resolved.settings["encode_special_tokens"]:
            raise EncoderUnavailableError(
                "it cannot take special tokens as text, as split_special_tokens asks"
            )
        if resolved.settings["add_special_tokens"]:
            if resolved.settings["template"] is None:
                raise EncoderUnavailableError("the post-processor is not a template")
            self._prefix, self._suffix = resolved.settings["template"]
        return library.load_hf_json(resolved.payload)

    def _open_sentencepiece(self, library: Any, resolved: ResolvedTokenizer) -> Any:
        content = resolved.accelerated or convert_sentencepiece(resolved.payload) or b""
        if content.startswith(_REASON):
            raise EncoderUnavailableError(json.loads(content)["reason"])
        return library.load_hf_json(content)

    def _open_tiktoken(self, library: Any, resolved: ResolvedTokenizer) -> Any:
        scheme = TIKTOKEN_SCHEMES.get(resolved.settings["pattern"])
        if scheme is None:
            raise EncoderUnavailableError("it does not know this pattern of words")
        special = resolved.settings["special_tokens"]
        ranks = resolved.payload.count(b"\n")
        # Megatron's special tokens come first, gigatoken's last.
        self._ranks_and_shift = ranks, len(special)
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(resolved.payload)
            file.flush()
            numbers = {token: number for number, token in enumerate(special, ranks)}
            return library.BPETokenizer.from_tiktoken(file.name, scheme, numbers)


def convert_sentencepiece(model: bytes) -> bytes | None:
    """Return a SentencePiece model in the format of gigatoken, or the reason why it can't be used, in JSON.

    SentencePiece matches no control pieces in a text. Models with user-defined pieces or normalization are
    left to SentencePiece: gigatoken 0.10 puts a space after the former and differs on rare characters in
    the latter. None without gigatoken.
    """
    try:
        # Optional, and needed only where a tokenizer is not in the cache.
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json
    except ImportError:
        return None
    reason = None
    try:
        content = json.loads(sentencepiece_to_tokenizer_json(model))
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        types = {step["type"] for step in content["normalizer"]["normalizers"]}
        if content["added_tokens"]:
            reason = "it is not exact for user-defined pieces"
        elif types & {"Precompiled", "Strip"}:
            reason = "it is not exact for normalized text"
    except (ValueError, KeyError, TypeError) as error:
        reason = _first_line(error)
    return json.dumps({"reason": reason} if reason else content).encode()


def unsupported_reason(content: dict[str, Any]) -> str | None:
    """Return what gigatoken 0.10 is known to do otherwise in a tokenizer's JSON, None if nothing.

    It finds other ends of words for added tokens that must be words, and other places for added tokens in
    normalized text; of the normalizers, it is exact for those listed.
    """
    added = content["added_tokens"]
    normalizer = content["normalizer"]
    if any(token["single_word"] for token in added):
        return "it is not exact for added tokens that must be words"
    if normalizer and any(token["normalized"] for token in added):
        return "it is not exact for added tokens in normalized text"
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    for step in steps:
        replaces_text = step["type"] == "Replace" and "String" in step["pattern"]
        if step["type"] not in ("Prepend", "NFC") and not replaces_text:
            return f"it is not exact for the normalizer {step['type']}"
    return None


def template_ids(post_processor: dict[str, Any] | None) -> tuple[list[int], list[int]] | None:
    """Return the ids that the post-processor of a tokenizer's JSON puts before and after a text.

    None where that is not all it does.
    """
    match post_processor:
        case None | {"type": "ByteLevel"}:
            return [], []
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, cls], "sep": [_, sep]}:
            return [cls], [sep]
        case {"type": "Sequence", "processors": processors}:
            prefix: list[int] = []
            suffix: list[int] = []
            for processor in processors:
                if (ids := template_ids(processor)) is None:
                    return None
                prefix, suffix = ids[0] + prefix, suffix + ids[1]
            return prefix, suffix
        case {"type": "TemplateProcessing", "single": single, "special_tokens": special}:
            sides: list[list[int]] = [[]]
            for item in single:
                if "SpecialToken" in item:
                    sides[-1] += special[item["SpecialToken"]["id"]]["ids"]
                else:
                    sides.append([])
            return (sides[0], sides[1]) if len(sides) == 2 else None
    return None


def _special_first(ids: NDArray[np.uint32], ranks: int, special: int) -> NDArray[np.uint32]:
    """Return the ids of a vocabulary whose ``special`` tokens come before its ``ranks``, not after."""
    shifted = ids + np.uint32(special)
    if ids.size and ids.max() >= ranks:
        shifted[ids >= ranks] -= np.uint32(ranks + special)
    return shifted


class _Array:
    """What gigatoken compares the type of its input with."""


# At every batch gigatoken looks up ``awkward``, for the type of its input and for the ``unflatten`` of its
# result: the flat ids and lengths, which are what we need. To import the real one takes 0.2 s of CPU time in
# each process, ten times what gigatoken takes. So this stands in for it during the call, and gives the arrays
# back as they are. It cannot stay: whoever imports awkward later in the process would get it. The library's
# other calls are slower: ``encode``, text by text, takes 1.2 times as long for texts of 4,000 characters, and
# 4 times for texts of 50; the others make Python integers, or a matrix padded to the longest text.
AWKWARD: Any = ModuleType("awkward")
AWKWARD.Array = _Array
AWKWARD.unflatten = lambda ids, lengths: (ids, lengths)


@contextmanager
def _awkward_replaced() -> Iterator[None]:
    """Put the stand-in in place of awkward: two assignments in a dictionary.

    Not for threads of which another imports awkward meanwhile; encoders run in processes of one thread.
    """
    real = sys.modules.get("awkward")
    sys.modules["awkward"] = AWKWARD
    try:
        yield
    finally:
        if real is None:
            del sys.modules["awkward"]
        else:
            sys.modules["awkward"] = real


def _encode_flat(backend: Any, texts: list[str]) -> Encoded:
    try:
        with _awkward_replaced():
            result = backend.encode_batch(texts, parallel=False)
    except (AttributeError, ImportError):  # a release that asks more of awkward
        result = None
    if isinstance(result, tuple):
        return result
    layout = backend.encode_batch(texts, parallel=False).layout
    offsets = np.asarray(layout.offsets.data)
    return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


@contextmanager
def _panics_unseen() -> Iterator[None]:
    """Keep what Rust writes on a panic, beside raising it, from the standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if len(line) <= 200 else line[:200] + "…"
