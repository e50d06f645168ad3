"""The tokenizer that a model was trained with, built as training built it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_periln.convert.model_folder import TOKENIZER_FILES, SpecialTokens
from megatron_periln.data.tokenizers.megatron_tokenizer import add_tokenizer_args, build_tokenizer
from megatron_periln.data.tokenizers.parts import Parts, sentencepiece_parts, take_apart
from megatron_periln.errors import PreprocessError, UsageError

__all__ = ["NoTokenizerError", "Source", "TrainingTokenizer", "beyond_files", "find_tokenizer"]

_HUGGING_FACE = ("HuggingFaceTokenizer", "SFTTokenizer")
_SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_WITHOUT_TEXTS = ("NullTokenizer", "NullMultimodalTokenizer")


class NoTokenizerError(Exception):
    """Why there is no tokenizer to export."""


@dataclass(frozen=True, kw_only=True)
class TrainingTokenizer:
    """One of Megatron's tokenizers.

    Parameters
    ----------
    args
        The flags that it was built from.
    built
        Megatron's object.
    parts
        What it is made of.
    """

    args: Namespace
    built: Any
    parts: Parts

    @classmethod
    def build(cls, args: Namespace) -> TrainingTokenizer:
        """Build the tokenizer of Megatron's flags.

        Raises
        ------
        PreprocessError
            If it can't be built.
        """
        built = build_tokenizer(args)
        return cls(args=args, built=built, parts=_parts(built))

    def __str__(self) -> str:
        return f"{self.args.tokenizer_type} {self.args.tokenizer_model or self.args.vocab_file or ''}".strip()

    @property
    def special_tokens(self) -> SpecialTokens:
        """The ids that training has for the end of a document and the like."""

        def number(name: str) -> int | None:
            try:
                found = getattr(self.built, name)
            except (AttributeError, NotImplementedError, NameError, TypeError):
                return None
            return found if isinstance(found, int) and found >= 0 else None

        return SpecialTokens(bos=number("bos"), eos=number("eod"), pad=number("pad"))

    @property
    def texts_of_special_tokens(self) -> list[str]:
        """What is treated in a special way where a text holds it, or might be."""
        return self.parts.special_tokens

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids that training gives each text."""
        if self.parts.kind == "tokenizers":  # all at once: what it does with one, several times as fast
            inner = self.built._tokenizer
            return inner.tokenizer(
                texts, add_special_tokens=inner.include_special_tokens, verbose=False
            ).input_ids
        return [[int(number) for number in self.built.tokenize(text)] for text in texts]

    def token_texts(self) -> list[str]:
        """Return the text of each token by its id; what is no whole character is replaced or left out."""
        if self.parts.kind == "tiktoken":
            return [*self.parts.special_tokens, *self.parts.strings]
        if self.parts.strings:
            return self.parts.strings
        inner = self.built._tokenizer.tokenizer
        return [inner.decode([number]) for number in range(self.built.vocab_size)]

    @property
    def size(self) -> int:
        """One more than the largest id."""
        if self.parts.kind == "tokenizers":  # whose ids may have gaps
            return max(self.built._tokenizer.tokenizer.get_vocab().values()) + 1
        return int(self.built.vocab_size)

    def token(self, number: int | None) -> str | None:
        """Return the name of a token."""
        if number is None:
            return None
        return str(self.built._tokenizer.ids_to_tokens([number])[0])


def _parts(built: Any) -> Parts:
    """Take a tokenizer apart; ``--tokenizer-sentencepiece-legacy`` alone changes no ids."""
    parts = take_apart(built)
    inner: Any = getattr(built, "_tokenizer", None)
    if parts.kind == "megatron" and getattr(inner, "legacy", False) and not beyond_files(built):
        return sentencepiece_parts(inner.tokenizer)
    return parts


def beyond_files(built: Any) -> str:
    """Return what Megatron does with a text around the library, and so nobody who reads files; "" if nothing.

    Source: ``SentencePieceTokenizer`` in megatron/core/tokenizers/text/libraries/sentencepiece_tokenizer.py.
    """
    inner: Any = getattr(built, "_tokenizer", None)
    if getattr(inner, "removed_extra_spaces", False) and not inner.ignore_extra_whitespaces:
        return (
            "--no-tokenizer-sentencepiece-ignore-extra-whitespaces: Megatron itself keeps the extra white "
            "space that the model would remove"
        )
    if getattr(inner, "legacy", False) and inner.special_token_to_id:
        return (
            "--tokenizer-special-tokens of a SentencePiece model: Megatron itself finds them in a text, "
            "and takes the space away that follows"
        )
    return ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What an export's tokenizer is made from, and what it is compared with.

    Parameters
    ----------
    training
        Gives the ids that are right.
    tokenizer
        What the files are made from: the same, unless a folder was given.
    folder
        Where it has files of transformers that can be copied; None if nowhere.
    """

    training: TrainingTokenizer
    tokenizer: TrainingTokenizer
    folder: Path | None


def find_tokenizer(saved: Namespace, given: Path | None) -> Source:
    """Find the tokenizer of a checkpoint.

    Parameters
    ----------
    saved
        Megatron's saved arguments, which name it.
    given
        ``--tokenizer``: a folder of transformers, or where the model file of the checkpoint's tokenizer is.

    Raises
    ------
    NoTokenizerError
        If the checkpoint names none that is here.
    UsageError
        If ``given`` is no tokenizer, or not the checkpoint's.
    """
    flags = vars(add_tokenizer_args(ArgumentParser()).parse_args([]))
    args = Namespace(**{**flags, **{name: value for name, value in vars(saved).items() if name in flags}})
    if given is None:
        own = _own(args)
        return Source(training=own, tokenizer=own, folder=_folder(args))
    try:
        training = _own(args)
    except NoTokenizerError:
        training = None
    tokenizer = _given(args, given)
    if training and tokenizer.parts.kind == "sentencepiece" == training.parts.kind:
        if tokenizer.parts.payload != training.parts.payload:
            raise UsageError(
                f"--tokenizer {given} is another than the checkpoint's, {args.tokenizer_model}; "
                "leave out --tokenizer, or remove what is no more the checkpoint's"
            )
        training = tokenizer
    return Source(training=training or tokenizer, tokenizer=tokenizer, folder=_folder(tokenizer.args))


def _own(args: Namespace) -> TrainingTokenizer:
    kind = args.tokenizer_type
    if not kind:
        raise NoTokenizerError("the checkpoint names none")
    if kind in _WITHOUT_TEXTS or kind == "MultimodalTokenizer":
        raise NoTokenizerError(f"the checkpoint was trained with {kind}")
    files = [name for name in (args.tokenizer_model, args.vocab_file, args.merge_file) if name]
    if kind in _HUGGING_FACE and files and not Path(files[0]).is_dir():
        raise NoTokenizerError(f"{files[0]} is no folder here")
    absent = [name for name in files if not Path(name).exists()]
    if absent:
        raise NoTokenizerError(f"{absent[0]} is no file here")
    if not files:
        raise NoTokenizerError(f"the checkpoint names no file of {kind}")
    if kind == "SFTTokenizer":  # which has a prompt's format around the tokenizer of a folder
        args = Namespace(**{**vars(args), "tokenizer_type": "HuggingFaceTokenizer"})
    try:
        return TrainingTokenizer.build(args)
    except PreprocessError as error:
        raise NoTokenizerError(str(error)) from error


def _given(args: Namespace, given: Path) -> TrainingTokenizer:
    """Build the tokenizer that ``--tokenizer`` names, with the other flags of the checkpoint."""
    kind, model = args.tokenizer_type, given
    if given.is_dir():
        if not any((given / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise UsageError(f"--tokenizer {given} holds no tokenizer.json; give a tokenizer's folder")
        if (given / "tokenizer.json").is_file() or kind not in _SENTENCEPIECE:
            kind = "HuggingFaceTokenizer"
        else:
            model = given / "tokenizer.model"
    elif not given.is_file():
        raise UsageError(f"--tokenizer {given}: no such folder, nor a file; give a tokenizer's folder")
    elif kind not in (*_SENTENCEPIECE, "TikTokenizer"):
        kind = "TikTokenizer" if given.suffix == ".json" else "SentencePieceTokenizer"
    values = {**vars(args), "tokenizer_type": kind, "tokenizer_model": str(model)}
    if kind == "HuggingFaceTokenizer" and args.tokenizer_type not in _HUGGING_FACE:
        values |= {"special_tokens": None, "metadata_path": None}
    values |= {"vocab_file": None, "merge_file": None}
    try:
        return TrainingTokenizer.build(Namespace(**values))
    except PreprocessError as error:
        raise UsageError(f"--tokenizer {given}: {error}") from error


def _folder(args: Namespace) -> Path | None:
    path = Path(args.tokenizer_model) if args.tokenizer_type in _HUGGING_FACE else None
    return path if path and path.is_dir() and any(_there(path)) else None


def _there(folder: Path) -> Iterable[Path]:
    return (folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
