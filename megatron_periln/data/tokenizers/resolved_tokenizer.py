"""A tokenizer of Megatron's as data: what `resolve` finds out, what the cache keeps, what encoders open."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

from megatron_periln.data.tokenizers.megatron_tokenizer import Tokenizer, build_tokenizer
from megatron_periln.errors import PreprocessError

__all__ = ["ResolvedTokenizer"]


@dataclass(frozen=True, eq=False)
class ResolvedTokenizer:
    """A tokenizer as data.

    Parameters
    ----------
    kind
        ``tokenizers``, ``sentencepiece`` or ``tiktoken``, the library that does the work; ``megatron`` where
        only Megatron's own object can.
    vocab_size
        Number of token ids.
    eod
        Id of the end-of-document token, None without one.
    digest
        A sha256 of everything that decides token ids: content, flags and versions.
    description
        A name for people.
    payload
        What the library builds its tokenizer from: the JSON of a Hugging Face tokenizer, a SentencePiece
        model, or ranks in the format of ``.tiktoken`` files, from 0.
    settings
        What else decides token ids. tokenizers: ``add_special_tokens``, ``encode_special_tokens``,
        ``template`` (the ids put before and after a text), ``unsupported`` (the reason why gigatoken is not
        exact); tiktoken: ``pattern``, ``special_tokens`` (the first ids; ranks follow).
    accelerated
        The tokenizer in the format of the fast encoder where making that takes time.
    differing
        Code points that the fast encoder takes for another kind of character than the library does, or
        normalizes otherwise; None where that could not be found out.
    unlike
        Where the fast encoder gives other ids than the library on entries of the vocabulary; None if nowhere.
    probes
        Texts with the token ids that Megatron's tokenizer gives them.
    args
        The tokenizer flags, None for a tokenizer that was given as an object.
    entry
        The key of its entry in the cache, None without one.
    """

    kind: str
    vocab_size: int
    eod: int | None
    digest: str
    description: str
    payload: bytes = field(default=b"", repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    accelerated: bytes | None = field(default=None, repr=False)
    differing: tuple[int, ...] | None = field(default=(), repr=False)
    unlike: str | None = field(default=None, repr=False)
    probes: tuple[tuple[str, list[int]], ...] = field(default=(), repr=False)
    args: Namespace | None = field(default=None, repr=False)
    entry: str | None = field(default=None, repr=False)
    _built: list[Tokenizer] = field(default_factory=list, repr=False)

    def megatron_tokenizer(self) -> Tokenizer:
        """Return Megatron's own tokenizer, built at the first call.

        Raises
        ------
        PreprocessError
            If Megatron cannot build it.
        """
        if not self._built:
            if self.args is None:
                raise PreprocessError(f"{self.description} is not described by flags")
            self._built.append(build_tokenizer(self.args))
        return self._built[0]
