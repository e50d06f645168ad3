"""Encoders on the libraries that Megatron's tokenizers stand on, and on Megatron's tokenizers themselves.

A library is imported when its tokenizer is built: a run needs one of them.
"""

from __future__ import annotations

import os
from binascii import a2b_base64
from functools import cached_property
from typing import Any

import numpy as np

from megatron_periln.data.tokenizers.encoders.base import Encoded, EncoderUnavailableError, join
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer

__all__ = ["MegatronEncoder", "SentencePieceEncoder", "TikTokenEncoder", "TokenizersEncoder"]


class _Encoder:
    name: str

    def __init__(self, resolved: ResolvedTokenizer) -> None:
        self._resolved = resolved

    @cached_property
    def _tokenizer(self) -> Any:
        raise NotImplementedError

    def load(self) -> None:
        """Build the library's tokenizer, if it is not built yet."""
        try:
            _ = self._tokenizer
        except ImportError as error:
            raise EncoderUnavailableError(f"{self.name} is not installed") from error


class TokenizersEncoder(_Encoder):
    """The backend of a Hugging Face tokenizer."""

    name = "tokenizers"

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer  # 10 ms, and may be missing

        # One thread: the callers are worker processes, one to a CPU.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = Tokenizer.from_str(self._resolved.payload.decode())
        tokenizer.encode_special_tokens = self._resolved.settings["encode_special_tokens"]
        return tokenizer

    def encode(self, texts: list[str]) -> Encoded:
        """Return the token ids of ``texts``."""
        encodings = self._tokenizer.encode_batch_fast(
            texts, add_special_tokens=self._resolved.settings["add_special_tokens"]
        )
        return join(np.array(encoding.ids, np.uint32) for encoding in encodings)


class SentencePieceEncoder(_Encoder):
    """A SentencePiece model."""

    name = "sentencepiece"

    @cached_property
    def _tokenizer(self) -> Any:
        from sentencepiece import SentencePieceProcessor  # 17 ms, and may be missing

        return SentencePieceProcessor(model_proto=self._resolved.payload)

    @cached_property
    def _options(self) -> dict[str, Any]:
        options = {"num_threads": 1, "return_type": "numpy"}
        try:
            self._tokenizer.encode(["a"], **options)
        except (TypeError, ValueError):  # before sentencepiece 0.2.2
            options = {"num_threads": 1, "out_type": int}
        return options

    def encode(self, texts: list[str]) -> Encoded:
        """Return the token ids of ``texts``."""
        return join(self._tokenizer.encode(texts, **self._options) if texts else [])


class TikTokenEncoder(_Encoder):
    """A tiktoken encoding with Megatron's ids: special tokens first."""

    name = "tiktoken"

    @cached_property
    def _tokenizer(self) -> Any:
        from tiktoken import Encoding  # 10 ms, and may be missing

        special = self._resolved.settings["special_tokens"]
        words = self._resolved.payload.split()
        return Encoding(
            name="megatron",
            pat_str=self._resolved.settings["pattern"],
            mergeable_ranks={a2b_base64(token): rank for rank, token in enumerate(words[::2], len(special))},
            special_tokens={token: number for number, token in enumerate(special)},
        )

    def encode(self, texts: list[str]) -> Encoded:
        """Return the token ids of ``texts``."""
        encode = getattr(self._tokenizer, "encode_to_numpy", self._tokenizer.encode)
        special = self._tokenizer.special_tokens_set
        starts = {token[:1] for token in special}
        # The set is copied at each call, which for Megatron's 1000 takes longer than most texts' encoding.
        return join(
            encode(
                text,
                allowed_special=special if any(start in text for start in starts) else set(),
                disallowed_special=(),
            )
            for text in texts
        )


class MegatronEncoder(_Encoder):
    """Megatron's own tokenizer, text by text."""

    name = "megatron"

    @cached_property
    def _tokenizer(self) -> Any:
        return self._resolved.megatron_tokenizer()

    def encode(self, texts: list[str]) -> Encoded:
        """Return the token ids of ``texts``."""
        rows = [np.array(self._tokenizer.tokenize(text), np.int64) for text in texts]
        if any(len(row) and not 0 <= row.min() <= row.max() < 2**32 for row in rows):
            raise ValueError("a token id below 0 or beyond 32 bits")
        return join(rows)
