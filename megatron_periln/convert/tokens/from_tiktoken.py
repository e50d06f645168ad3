"""Megatron's tiktoken vocabularies as a ``tokenizer.json``, whose ids are those of tiktoken."""

from __future__ import annotations

import base64
from typing import Any

from megatron_periln.convert.tokens.json_parts import InexpressibleError, added_token, splits
from megatron_periln.data.tokenizers.encoders.characters import byte_names

__all__ = ["tokenizer_json"]


def tokenizer_json(ranks: bytes, pattern: str, special_tokens: list[str]) -> dict[str, Any]:
    """Return what ``tokenizer.json`` holds.

    Parameters
    ----------
    ranks
        The vocabulary in the format of ``.tiktoken`` files.
    pattern
        How texts are split.
    special_tokens
        The first ids; those of the vocabulary follow.

    Raises
    ------
    InexpressibleError
        If a special token is also in the vocabulary.
    """
    words = [base64.b64decode(word) for word in ranks.split()[::2]]
    names = byte_names()
    texts = ["".join(names[byte] for byte in word) for word in words]
    if both := sorted(set(special_tokens) & set(texts)):
        raise InexpressibleError(f"the special token {both[0]!r} is also a word of the vocabulary")
    splits = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = [*special_tokens, *texts]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(number, token) for number, token in enumerate(special_tokens)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [splits, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text: number for number, text in enumerate(vocabulary)},
            "merges": _merges(texts),
        },
    }


def _merges(texts: list[str]) -> list[list[str]]:
    """Return every split of a word into two words, by the rank of the word."""
    known = set(texts)
    return [list(pair) for text in texts for pair in splits(text, known)]
