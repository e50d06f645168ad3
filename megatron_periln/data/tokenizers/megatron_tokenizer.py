"""Megatron's tokenizer: its flags, and one clear error where building it fails.

Importing this module, parsing the flags and checking the files they name need neither torch nor Megatron.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from megatron_periln.errors import PreprocessError, with_kind
from megatron_periln.package_versions import refuse_version_mismatch
from megatron_periln.vocabulary_files import KINDS, check_vocabulary_files

__all__ = [
    "TOKENIZER_FLAGS",
    "Tokenizer",
    "add_tokenizer_args",
    "build_tokenizer",
    "check_tokenizer_files",
    "end_of_document",
    "explained_tokenizer",
]

_TYPES = (
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "GPT2BPETokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "MultimodalTokenizer",
    "NullTokenizer",
    "NullMultimodalTokenizer",
    "SFTTokenizer",
)
_SWITCH: dict[str, Any] = {"action": "store_true"}

TOKENIZER_FLAGS: dict[str, dict[str, Any]] = {
    "--vocab-size": {"type": int, "help": "size of the vocabulary, before padding"},
    "--padded-vocab-size": {"type": int, "help": "size of the model's vocabulary; not used here"},
    "--no-pad-vocab-size --disable-pad-vocab-size": {
        "action": "store_false",
        "dest": "pad_vocab_size",
        "help": "leave the model's vocabulary unpadded; not used here",
    },
    "--vocab-file": {"type": str, "help": "vocabulary file of a BPE or WordPiece tokenizer"},
    "--merge-file": {"type": str, "help": "merges file of a BPE tokenizer"},
    "--vocab-extra-ids": {"type": int, "default": 0, "help": "sentinel tokens of T5; not used here"},
    "--tokenizer-type": {"type": str, "choices": _TYPES, "help": "kind of tokenizer"},
    "--tokenizer-model": {"type": str, "help": "model file, folder or Hugging Face name of the tokenizer"},
    "--tokenizer-metadata": {"dest": "metadata_path", "type": str, "help": "Megatron's metadata, in JSON"},
    "--tokenizer-special-tokens": {
        "dest": "special_tokens",
        "type": str,
        "nargs": "+",
        "help": "special tokens; for TikTokenizer with <unk> <s> </s> <mask> <pad> <cls> <sep> among them",
    },
    "--tiktoken-pattern": {"type": str, "choices": ("v1", "v2"), "help": "how TikTokenizer splits words"},
    "--tiktoken-num-special-tokens": {
        "type": int,
        "default": 1000,
        "help": "number of ids that TikTokenizer keeps for special tokens",
    },
    "--tokenizer-sentencepiece-legacy": {**_SWITCH, "help": "let SentencePiece have added special tokens"},
    "--no-tokenizer-sentencepiece-ignore-extra-whitespaces "
    "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces": {
        "action": "store_false",
        "dest": "tokenizer_sentencepiece_ignore_extra_whitespaces",
        "help": "keep the extra white space that a SentencePiece model would remove",
    },
    "--tokenizer-hf-no-use-fast": {**_SWITCH, "help": "use the slow Hugging Face tokenizer"},
    "--tokenizer-hf-no-include-special-tokens": {
        **_SWITCH,
        "help": "leave out the special tokens that a Hugging Face tokenizer adds to a text",
    },
    "--trust-remote-code": {**_SWITCH, "help": "run code that comes with a Hugging Face tokenizer"},
    "--null-tokenizer-eod-id": {"type": int, "help": "end-of-document token of NullTokenizer"},
    "--null-tokenizer-pad-id": {"type": int, "default": -1, "help": "padding token of NullTokenizer"},
    "--chat-template": {"type": str, "help": "chat template, in Jinja; not used here"},
}
"""Megatron's tokenizer flags (``TokenizerConfig`` in megatron/training/config/training_config.py)."""

_NEEDS_FILE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer")
_TAKES_HUB_NAME = ("HuggingFaceTokenizer", "SFTTokenizer")
_HUB_SECONDS = 10
_BUILDING = "megatron/core/tokenizers/utils/build_tokenizer.py"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class EndsDocuments(Protocol):
    """What may have an end-of-document token."""

    @property
    def eod(self) -> int | None:
        """Id of the end-of-document token; None or negative where there is none."""


class Tokenizer(EndsDocuments, Protocol):
    """What preprocessing uses of Megatron's tokenizers.

    Source: ``MegatronTokenizerText`` (megatron/core/tokenizers/text/text_tokenizer.py).
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    def tokenize(self, text: str) -> Sequence[int]:
        """Return the token ids of ``text``."""


def add_tokenizer_args(parser: ArgumentParser) -> ArgumentParser:
    """Add Megatron's tokenizer flags to ``parser`` and return it, without importing Megatron.

    Source: ``_add_tokenizer_args`` (megatron/training/arguments.py).
    """
    group = parser.add_argument_group("tokenizer")
    for names, options in TOKENIZER_FLAGS.items():
        group.add_argument(*names.split(), **options)
    return parser


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
    check_tokenizer_files(args)
    if args.tokenizer_type in _TAKES_HUB_NAME and args.tokenizer_model:
        _check_hub(args.tokenizer_model)
    refuse_version_mismatch()
    # Imports torch, for seconds; a tokenizer that the cache knows needs neither.
    from megatron.core.tokenizers.utils import build_tokenizer as megatron_tokenizers

    from megatron_periln.patches.tokenizer_files import read_vocabulary_files

    read_vocabulary_files()

    # Padding of the vocabulary concerns the model and would need its flags.
    args = Namespace(**{**vars(args), "pad_vocab_size": False})
    with explained_tokenizer(args):
        return cast(Tokenizer, megatron_tokenizers.build_tokenizer(args))


@contextmanager
def explained_tokenizer(args: Namespace) -> Iterator[None]:
    """Explain what goes wrong meanwhile while Megatron builds the tokenizer of these flags.

    Raises
    ------
    PreprocessError
        For whatever Megatron or a tokenizer library raises there.
    """
    try:
        yield
    except Exception as error:
        frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
        if not any(code.co_filename.endswith(_BUILDING) for code in frames):
            raise
        reason = with_kind(error)
        hint = "check --tokenizer-model and the other tokenizer flags"
        if args.tokenizer_type == "TikTokenizer":
            hint = (
                "it needs a .json with a list of rank, token_bytes and token_str that begins with the 256 "
                "bytes in order (of a tekken.json, its list vocab), and --vocab-size must be its length, or "
                "less, plus --tiktoken-num-special-tokens"
            )
        elif args.tokenizer_type in KINDS:
            hint = "check --vocab-file and --merge-file, and the other tokenizer flags"
        elif args.tokenizer_model and not Path(args.tokenizer_model).exists():
            hint = f"{args.tokenizer_model} is no local folder, and the Hugging Face hub did not provide it"
        raise PreprocessError(f"{args.tokenizer_type} cannot be built: {reason}; {hint}") from error


def end_of_document(tokenizer: EndsDocuments) -> int:
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
    """Check that there is a tokenizer type, and that the files exist that its flags name.

    Raises
    ------
    PreprocessError
        Naming the flag and the file.
    """
    if not args.tokenizer_type:
        raise PreprocessError(
            "--tokenizer-type is missing: name one, such as HuggingFaceTokenizer with --tokenizer-model "
            "FOLDER, or GPT2BPETokenizer with --vocab-file and --merge-file"
        )
    if args.tokenizer_type == "NullTokenizer" and not args.vocab_size:
        raise PreprocessError("NullTokenizer needs --vocab-size, the number of its ids")
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
    if args.tokenizer_type in _TAKES_HUB_NAME and Path(args.tokenizer_model or "").is_file():
        raise PreprocessError(
            f"--tokenizer-model {args.tokenizer_model}: a file, and {args.tokenizer_type} takes a folder: "
            f"name the one that holds tokenizer_config.json"
        )
    if args.tokenizer_type in KINDS:
        _check_vocabulary(args)


def _check_vocabulary(args: Namespace) -> None:
    """Check the files of a vocabulary and of its merges; without any, what Megatron fetches instead.

    Raises
    ------
    PreprocessError
        If one is missing or is not what it should be.
    """
    if args.vocab_file:
        check_vocabulary_files(args.tokenizer_type, args.vocab_file, args.merge_file)
        return
    flags = "--vocab-file and --merge-file" if KINDS[args.tokenizer_type].merges else "--vocab-file"
    if args.merge_file or not _megatron_fetches(args.tokenizer_type):
        raise PreprocessError(f"{args.tokenizer_type} needs {flags}, the paths of its files")


def _megatron_fetches(kind: str) -> bool:
    """Tell whether Megatron gets the files that it fetches; what is in them it takes from the hub."""
    base = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    cached = Path(base).expanduser() / "megatron" / f"{kind}_vocab"
    return cached.exists() or importlib.util.find_spec("wget") is not None


def _check_hub(name: str) -> None:
    """Check that the Hugging Face hub has a model of this name, unless there is a folder or a local copy.

    One question, where transformers would ask for a minute before it says no.

    Raises
    ------
    PreprocessError
        If it has none, or cannot be reached.
    """
    if Path(name).exists():
        return
    import huggingface_hub  # what it imports at its first use is not for tokenizers in local folders

    try:
        huggingface_hub.snapshot_download(name, local_files_only=True)
    except (OSError, ValueError):  # no local copy, which is each of them
        print(f"note: {name} is no local folder: asking the Hugging Face hub", file=sys.stderr, flush=True)
        try:
            huggingface_hub.model_info(name, timeout=_HUB_SECONDS)
        except Exception as error:
            reason = with_kind(error)
            raise PreprocessError(
                f"--tokenizer-model {name}: no such folder, and the Hugging Face hub does not provide it: "
                f"{reason}"
            ) from error
