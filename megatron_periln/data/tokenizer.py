"""Megatron's tokenizer, with one clear error where building it fails."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from megatron_periln.data.errors import PreprocessError

__all__ = ["Tokenizer", "build_tokenizer", "check_tokenizer_files", "end_of_document"]

_NEEDS_FILE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer")
_TAKES_HUB_NAME = ("HuggingFaceTokenizer", "SFTTokenizer")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class Tokenizer(Protocol):
    """What preprocessing uses of Megatron's tokenizers.

    Source: ``MegatronTokenizerText`` (megatron/core/tokenizers/text/text_tokenizer.py).
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def eod(self) -> int | None:
        """Id of the end-of-document token; None or negative where there is none."""

    def tokenize(self, text: str) -> Sequence[int]:
        """Return the token ids of ``text``."""


def build_tokenizer(args: Namespace) -> Tokenizer:
    """Build the tokenizer that Megatron's tokenizer flags describe.

    Parameters
    ----------
    args
        The flags of ``_add_tokenizer_args`` (megatron/training/arguments.py).

    Raises
    ------
    PreprocessError
        If a file is missing or Megatron cannot build the tokenizer from what it holds.
    """
    from megatron.core.tokenizers.utils import build_tokenizer as megatron_tokenizers

    if not args.tokenizer_type:
        raise PreprocessError("--tokenizer-type is missing: name one, such as HuggingFaceTokenizer")
    check_tokenizer_files(args)
    # Padding of the vocabulary concerns the model and would need its flags.
    args = Namespace(**{**vars(args), "pad_vocab_size": False})
    try:
        return cast(Tokenizer, megatron_tokenizers.build_tokenizer(args))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        hint = "check --tokenizer-model and the other tokenizer flags"
        if args.tokenizer_type == "TikTokenizer":
            hint = (
                "it needs a JSON list of rank, token_bytes and token_str, and --vocab-size must be "
                "its length plus --tiktoken-num-special-tokens"
            )
        elif args.tokenizer_model and not Path(args.tokenizer_model).exists():
            hint = f"{args.tokenizer_model} is no local folder, and the Hugging Face hub did not provide it"
        raise PreprocessError(f"{args.tokenizer_type} cannot be built: {reason}; {hint}") from error


def end_of_document(tokenizer: Tokenizer) -> int:
    """Return the id of the end-of-document token.

    Raises
    ------
    PreprocessError
        If the tokenizer has none, such as a HuggingFace tokenizer without an eos token.
    """
    try:
        eod = tokenizer.eod
    except (AttributeError, NotImplementedError):
        eod = None
    if eod is None or eod < 0:
        raise PreprocessError(
            "--append-eod: this tokenizer has no end-of-document token; "
            "give it an eos token or drop --append-eod"
        )
    return eod


def check_tokenizer_files(args: Namespace) -> None:
    """Check that the files exist that the tokenizer flags name.

    Raises
    ------
    PreprocessError
        Naming the flag and the file.
    """
    named = args.tokenizer_model or (args.vocab_file and args.tokenizer_type in _TAKES_HUB_NAME)
    if args.tokenizer_type in (*_NEEDS_FILE, *_TAKES_HUB_NAME) and not named:
        raise PreprocessError(f"{args.tokenizer_type} needs --tokenizer-model, the path of its model")
    flags = {
        "--tokenizer-model": args.tokenizer_model,
        "--vocab-file": args.vocab_file,
        "--merge-file": args.merge_file,
        "--tokenizer-metadata": args.metadata_path,
    }
    for flag, value in flags.items():
        hub = (
            flag == "--tokenizer-model"
            and args.tokenizer_type in _TAKES_HUB_NAME
            and _HUB_NAME.fullmatch(value or "")
        )
        if value and not hub and not Path(value).exists():
            raise PreprocessError(f"{flag} {value}: no such file")
