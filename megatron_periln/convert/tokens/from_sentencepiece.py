"""A SentencePiece model as a ``tokenizer.json``, whose ids are those of SentencePiece.

Three things stand otherwise than in transformers' own conversion, whose ids differ:

- SentencePiece sees a text as a whole. Nothing is split before BPE or unigram, but around user-defined
  pieces, which BPE takes first.
- Control pieces are never found in a text. They are added tokens, so that a tokenizer knows which they are,
  and the tokenizer is told to take them for text (``split_special_tokens``).
- White space: the dummy prefix stands once, in front of the whole text, also where it begins with a
  user-defined piece; of extra spaces, those in front go too.

Whether the ids are the same is measured afterwards: where tokenizers has nothing for a rule they are not.
"""

from __future__ import annotations

import base64
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from sentencepiece import SentencePieceProcessor

from megatron_periln.convert.tokens.json_parts import InexpressibleError, added_token, splits
from megatron_periln.convert.tokens.sentencepiece_model import Kind, Piece, SentencePieceModel

__all__ = ["suspects", "tokenizer_json"]

_SPACE = "▁"
_NEVER = 1e6
"""What is taken off the score of a unigram piece that is never found in a text."""
_PENALTY = 10.0
"""What SentencePiece takes off the lowest score for an unknown character."""


def tokenizer_json(model: SentencePieceModel) -> dict[str, Any]:
    """Return what ``tokenizer.json`` holds.

    Raises
    ------
    InexpressibleError
        If the model has a rule for which there is nothing.
    """
    if model.model_type == "word":
        raise InexpressibleError("model_type word: words that are not in the vocabulary have no pieces")
    if model.space_is_suffix and model.dummy_prefix:
        raise InexpressibleError("treat_whitespace_as_suffix: there is no normalizer that appends a space")
    counts = Counter(piece.text for piece in model.pieces)
    if counts.total() > len(counts):
        double = next(text for text, count in counts.items() if count > 1)
        raise InexpressibleError(f"two pieces of one text, {double!r}")
    space = _SPACE if model.escape_spaces else " "
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(number, piece.text)
            for number, piece in enumerate(model.pieces)
            if piece.kind in (Kind.CONTROL, Kind.UNKNOWN)
        ],
        "normalizer": _sequence("normalizers", _normalizers(model, space)),
        "pre_tokenizer": _sequence("pretokenizers", _splits(model)),
        "post_processor": None,
        "decoder": _sequence("decoders", _decoders(model, space)),
        "model": _unigram(model) if model.model_type == "unigram" else _bpe(model),
    }


def suspects(model: SentencePieceModel) -> str:
    """Return the rules of a model that tokenizers may read otherwise, for a model whose ids differ."""
    found = {
        f"the normalization rule {model.rule or 'of its own'}": bool(model.characters),
        "pieces that are UNUSED": bool(model.texts(Kind.UNUSED)),
        "user-defined pieces": bool(model.texts(Kind.USER_DEFINED)),
        "scores that SentencePiece adds up in 32 bits and tokenizers in 64": model.model_type == "unigram",
        "texts such as <0x41>, where the vocabulary lacks their characters": (
            model.model_type == "unigram" and model.byte_fallback and not _spells_bytes(model)
        ),
        "pieces of one score": model.model_type == "bpe" and _has_ties(model),
    }
    return ", ".join(name for name, there in found.items() if there) or "none that is known"


def _spells_bytes(model: SentencePieceModel) -> bool:
    return set("<0x123456789ABCDEF>") <= set(model.texts(Kind.NORMAL))


def _has_ties(model: SentencePieceModel) -> bool:
    scores = [piece.score for piece in model.pieces if piece.kind is Kind.NORMAL]
    return len(set(scores)) < len(scores)


def _sequence(name: str, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"type": "Sequence", name: steps} if steps else None


def _normalizers(model: SentencePieceModel, space: str) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if model.characters:
        charsmap = base64.b64encode(model.characters).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_spaces:
        steps += [_replace(r"\A +", ""), _replace(" {2,}", " ")]
    if model.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": space})
    if model.escape_spaces:
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    if model.remove_extra_spaces:
        steps.append(_replace(rf"{space}+\z", ""))
    return steps


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _decoders(model: SentencePieceModel, space: str) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": space}, "content": " "}]
    if model.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if model.dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _splits(model: SentencePieceModel) -> list[dict[str, Any]]:
    """Return what sets user-defined pieces apart, so that BPE finds them in its vocabulary as they are.

    It would then find in its vocabulary whatever else stands between two of them, or is the whole text: the
    texts of control pieces and bytes are split as SentencePiece splits them.
    """
    defined = model.texts(Kind.USER_DEFINED)
    if model.model_type == "unigram" or not defined:
        return []
    longest_first = sorted(defined, key=len, reverse=True)
    patterns = ["|".join(map(re.escape, longest_first))]
    processor = SentencePieceProcessor(model_proto=model.content)
    starts: dict[str, list[str]] = defaultdict(list)
    for text in model.texts(Kind.CONTROL, Kind.UNKNOWN, Kind.BYTE):
        pieces = processor.encode(defined[0] + text, out_type=str)
        start = pieces[pieces.index(defined[0]) + 1] if defined[0] in pieces[:-1] else ""
        length = len(start) if text.startswith(start) else 1
        starts[text[:length]].append(text[length:])
    patterns += [
        rf"\A{re.escape(start)}(?=(?:{'|'.join(map(re.escape, rest))})\z)"
        for start, rest in starts.items()
        if start and all(rest)
    ]
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    unknown = model.texts(Kind.UNKNOWN)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown[0] if unknown else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": bool(_splits(model)),
        "vocab": {piece.text: number for number, piece in enumerate(model.pieces)},
        "merges": _merges(model.pieces) if model.model_type == "bpe" else [],
    }


def _merges(pieces: Iterable[Piece]) -> list[list[str]]:
    """Return every split of a piece into two, the best piece first.

    SentencePiece merges the neighbours that are the best piece together, whatever they are apart.
    """
    whole = {piece.text: piece.score for piece in pieces if piece.kind is Kind.NORMAL}
    merges = [(score, *pair) for text, score in whole.items() for pair in splits(text, whole)]
    return [[left, right] for _, left, right in sorted(merges, key=lambda merge: -merge[0])]


def _unigram(model: SentencePieceModel) -> dict[str, Any]:
    normal = [piece.score for piece in model.pieces if piece.kind is Kind.NORMAL]
    lowest, highest = min(normal, default=0.0), max(normal, default=0.0)

    def score(piece: Piece) -> float:
        if piece.kind is Kind.NORMAL:
            return piece.score
        if piece.kind is Kind.USER_DEFINED:
            return len(piece.text.encode()) * highest - 0.1
        return lowest - _PENALTY - _NEVER

    unknown = next((at for at, piece in enumerate(model.pieces) if piece.kind is Kind.UNKNOWN), None)
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": [[piece.text, score(piece)] for piece in model.pieces],
        "byte_fallback": model.byte_fallback,
    }
