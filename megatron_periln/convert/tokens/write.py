"""Writing an export's tokenizer, and proving that it gives the ids that the model was trained with."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from megatron_periln.convert.model_folder import SpecialTokens
from megatron_periln.convert.tokens import from_sentencepiece
from megatron_periln.convert.tokens.auto_tokenizer import UnreadableError, load
from megatron_periln.convert.tokens.json_parts import InexpressibleError
from megatron_periln.convert.tokens.sentencepiece_model import SentencePieceModel
from megatron_periln.convert.tokens.texts import texts_for
from megatron_periln.convert.tokens.tokenizer_files import PLAIN_CLASSES, Candidate, candidates
from megatron_periln.convert.tokens.training_tokenizer import (
    NoTokenizerError,
    Source,
    TrainingTokenizer,
    find_tokenizer,
)
from megatron_periln.errors import UsageError

__all__ = ["ExportedTokenizer", "prepare_tokenizer"]

_WITHOUT = "--no-tokenizer exports the model alone"


@dataclass(frozen=True)
class ExportedTokenizer:
    """What an export says of its tokenizer.

    Parameters
    ----------
    tokens
        The ids of special tokens, for the model's configuration.
    source
        The tokenizer; None where there is none to write.
    reason
        Why there is none.
    """

    tokens: SpecialTokens
    source: Source | None
    reason: str = ""

    def write(self, folder: Path, vocab_size: int, longest: int, prefixes: list[str]) -> str:
        """Write the files of the tokenizer, which give the ids of training, and say how that is known.

        Parameters
        ----------
        folder
            The model's, with its config.json, which has a say in what its tokenizer does.
        vocab_size
            Of the model.
        longest
            The length of the model's sequences.
        prefixes
            Indexed datasets of which documents are compared.

        Raises
        ------
        UsageError
            If nothing that can be written gives these ids.
        """
        if self.source is None:
            return f"no tokenizer files: {self.reason}"
        size = self.source.training.size
        if size > vocab_size:
            raise UsageError(
                f"the tokenizer has ids up to {size - 1:,}, and the model's vocabulary {vocab_size:,}; "
                f"{_WITHOUT}"
            )
        return _write_proven(self.source, folder, longest, prefixes)


def prepare_tokenizer(saved: Namespace, given: Path | None, *, wanted: bool = True) -> ExportedTokenizer:
    """Find the tokenizer of a checkpoint, of which the model's configuration names the special tokens.

    Parameters
    ----------
    saved
        Megatron's saved arguments.
    given
        ``--tokenizer``.
    wanted
        Whether its files are to be written; without them its special tokens are named all the same.

    Raises
    ------
    UsageError
        If ``given`` is no tokenizer, or not the checkpoint's.
    """
    try:
        source = find_tokenizer(saved, given)
    except NoTokenizerError as reason:
        return ExportedTokenizer(_ids_without_texts(saved), None, f"{reason}; --tokenizer PATH adds them")
    if not wanted:
        return ExportedTokenizer(source.training.special_tokens, None, "--no-tokenizer")
    return ExportedTokenizer(source.training.special_tokens, source)


def _ids_without_texts(saved: Namespace) -> SpecialTokens:
    """Return the special tokens of Megatron's ``NullTokenizer``, which has ids alone."""
    if getattr(saved, "tokenizer_type", None) != "NullTokenizer" or not getattr(saved, "vocab_size", None):
        return SpecialTokens()
    try:
        return TrainingTokenizer.build(saved).special_tokens
    except UsageError:
        return SpecialTokens()


def _write_proven(source: Source, folder: Path, longest: int, prefixes: list[str]) -> str:
    try:
        ways = candidates(source, longest)
    except InexpressibleError as error:
        raise UsageError(
            f"{source.tokenizer} can't be expressed in a tokenizer.json: {error}; {_WITHOUT}"
        ) from error
    texts = texts_for(source.training, prefixes)
    expected = source.training.encode(texts.every)
    eos = source.training.special_tokens.eos
    problems: list[str] = []
    for way in ways:
        way.write(folder)
        problem = _problem(folder, way, texts.every, expected, eos) or (
            way is not ways[-1] and _class(folder)
        )
        if not problem:
            data = f" ({texts.documents} of the data)" if texts.documents else ""
            mended = f", because {problems[0]}" if problems else ""
            return (
                f"{way.name}{mended}; ids equal on {len(texts.texts):,} texts{data}, "
                f"{len(texts.tokens):,} tokens' own text; {_named(source, eos)}"
            )
        problems.append(f"{way.name}: {problem}")
    raise UsageError(
        f"no tokenizer files give the ids of training's {source.training}: {'; '.join(problems)}"
        f"{_suspects(source)}; {_WITHOUT}"
    )


def _problem(
    folder: Path, way: Candidate, texts: list[str], expected: list[list[int]], eos: int | None
) -> str | None:
    """Return what is wrong with a tokenizer's files, None if nothing."""
    try:
        (loaded,) = load([folder], texts)
    except UnreadableError as error:
        return f"AutoTokenizer can't read it: {error}"
    if difference := _first_difference(texts, loaded.ids, expected):
        return difference
    if loaded.eos != eos:
        return f"its end-of-sequence token is {loaded.eos}, and training's {eos}"
    if way.copied and (folder / "tokenizer.json").is_file():
        # What its class makes of it is not what other programs read, nor other versions of transformers.
        alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
        alone.no_truncation()
        alone.no_padding()
        ids = [encoding.ids for encoding in alone.encode_batch(texts)]
        if difference := _first_difference(texts, ids, expected):
            return f"tokenizer.json without the class that reads it: {difference}"
    return None


def _class(folder: Path) -> str | None:
    """Return why copied files may give other ids in other versions of transformers, None if they can't.

    LlamaTokenizer puts a token in front of a text in 4.57, and not in 5.23, which takes it for another class;
    classes that only one of them has can't be read in the other.
    """
    path = folder / "tokenizer_config.json"
    kind = json.loads(path.read_text("utf-8")).get("tokenizer_class") if path.is_file() else None
    if kind in PLAIN_CLASSES:
        return None
    return f"versions of transformers differ on {f'the class {kind}' if kind else 'files that name no class'}"


def _named(source: Source, eos: int | None) -> str:
    return (
        "no end-of-document token"
        if eos is None
        else f"end-of-document token {eos} {source.training.token(eos)}"
    )


def _suspects(source: Source) -> str:
    if source.tokenizer.parts.kind != "sentencepiece":
        return ""
    rules = from_sentencepiece.suspects(SentencePieceModel.read(source.tokenizer.parts.payload))
    return f"; what tokenizers reads otherwise: {rules}"


def _first_difference(texts: list[str], ids: list[list[int]], expected: list[list[int]]) -> str | None:
    for text, found, right in zip(texts, ids, expected, strict=True):
        if found != right:
            shared = min(len(found), len(right))
            at = next((at for at in range(shared) if found[at] != right[at]), shared)
            shown = repr(text) if len(text) <= 60 else f"{text[:45]!r}..."
            window = slice(max(0, at - 1), at + 4)
            return f"for {shown} at token {at} it gives {found[window]}, training {right[window]}"
    return None
