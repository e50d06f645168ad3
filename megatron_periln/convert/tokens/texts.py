"""The texts on which an export's tokenizer must give the ids of training."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from megatron_periln.convert.tokens.sentencepiece_model import Kind, SentencePieceModel
from megatron_periln.convert.tokens.training_tokenizer import TrainingTokenizer
from megatron_periln.data.indexed.decoding import decode_documents
from megatron_periln.data.indexed.format import IndexedDatasetError
from megatron_periln.data.indexed.index_arrays import IndexArrays
from megatron_periln.data.tokenizers.probes import probe_texts, vocabulary_texts
from megatron_periln.errors import UsageError

__all__ = ["FEATURES", "Texts", "data_prefixes", "repeated_texts", "texts_for"]

FEATURES = {
    "digits": ["1234567890", "3.14159", "a1b22c333", "12,345,678", "2024-11-28", "٣٤٥ ²³ ½ Ⅷ", "0x1F 1e-9"],
    "case": ["HELLO World", "camelCase XMLHttpRequest", "İstanbul ß ẞ ǅ", "iPhone NASA's"],
    "contractions": ["don't I'LL we've it's 'tis", "rock'n'roll \u2019s o'clock'S", "she'd'VE"],
    "spaces and newlines": [
        " a",
        "a ",
        "  a   b    c",
        "\n\n  x\n\t\ty\r\nz\r",
        "a\u00a0b\u3000c\u2003d\u200b",
        "\n",
        " ",
    ],
    "CJK": ["漢字かなカナ한국어", "中文\uff0c。「引用」 混ざった text", "ไทยภาษา", "𠀀𠮷"],
    "combining marks": [
        "e\u0301 é",
        "a\u0308\u0301",
        "\u1100\u1161\u11a8 각",
        "हिन्दी",
        "x\u0328\u0301\u0302",
    ],
    "empty": [""],
}
"""Texts for each thing that pre-tokenizers and normalizers do."""
_MIXTURES = 10_000
_DOCUMENTS = 200
_DOCUMENT_TOKENS = 512
_JOINED = 200
_START, _ENOUGH = 16, 5
"""How many tokens of a document its text must give again, and of how many documents one at least."""
_ROOTS = 64
_REPEATED = 60


@dataclass(frozen=True)
class Texts:
    """What is compared.

    Parameters
    ----------
    texts
        Texts for each feature, mixtures of what tokenizers differ on, and documents of the data.
    tokens
        The text of every token.
    documents
        How many of the texts are the data's.
    """

    texts: list[str]
    tokens: list[str]
    documents: int

    @property
    def every(self) -> list[str]:
        """All of them."""
        return [*self.texts, *self.tokens]


def texts_for(training: TrainingTokenizer, prefixes: list[str]) -> Texts:
    """Return the texts on which a tokenizer is compared.

    Parameters
    ----------
    training
        The tokenizer of training.
    prefixes
        Indexed datasets that it made.

    Raises
    ------
    UsageError
        If a dataset can't be read or holds ids that the tokenizer has not.
    """
    tokens = training.token_texts()
    special = training.parts.special_tokens
    features = [text for texts in FEATURES.values() for text in texts]
    for token in special[:64]:
        features += [token, f"a{token}b", f" {token} {token}\n"]
    mixtures = probe_texts(special, training.parts.vocabulary or tokens, _MIXTURES)
    joined = ["".join(mixtures[at : at + _JOINED]) for at in range(0, len(mixtures), _JOINED)]
    documents = [text for prefix in prefixes for text in _documents(training, prefix, len(prefixes))]
    # A tokenizer that was made from another's rules is compared on neighbours in the vocabulary too.
    more = vocabulary_texts(tokens) if training.parts.kind in ("sentencepiece", "tiktoken") else []
    if training.parts.kind == "sentencepiece":
        more += repeated_texts(SentencePieceModel.read(training.parts.payload))
    return Texts([*features, *mixtures, *joined, *more, *documents], tokens, len(documents))


def repeated_texts(model: SentencePieceModel) -> list[str]:
    """Return texts that a unigram model splits in several ways which are equally good, if it has such.

    ``==`` and ``=`` have the sum of ``=`` and ``==``. The first is taken, or by SentencePiece, which rounds
    its sums to 32 bits, whichever the sum of all that stands before has it.
    """
    if model.model_type != "unigram":
        return []
    powers: dict[str, int] = {}
    words = [text for text in model.texts(Kind.NORMAL) if text.replace("▁", "").isalnum()]
    for text in model.texts(Kind.NORMAL):
        root = text[: (text + text).find(text, 1)]
        powers[root] = powers.get(root, 0) + 1
    roots = [root for root, number in powers.items() if number > 1][:_ROOTS]
    draw = random.Random(0)
    texts = [
        "".join(draw.choices(words or [""], k=times % 7)) + root * times
        for root in roots
        for times in range(2, _REPEATED)
    ]
    return [text.replace("▁", " ") for text in texts]


def data_prefixes(given: list[str] | None, saved: list[str] | str | None) -> list[str]:
    """Return the prefixes of the indexed datasets that are here.

    Parameters
    ----------
    given
        ``--data-path`` of the export.
    saved
        That of the checkpoint, with weights in between.

    Raises
    ------
    UsageError
        If there is no dataset of a given prefix.
    """
    names = given or ([saved] if isinstance(saved, str) else saved or [])
    prefixes = [name for name in names if Path(f"{name}.idx").is_file() and (given or _is_readable(name))]
    if given:
        absent = [name for name in names if name not in prefixes and not _is_number(name)]
        if absent:
            raise UsageError(f"--data-path {absent[0]}: there is no {absent[0]}.idx; give a dataset's prefix")
    return prefixes[:8]


def _is_readable(prefix: str) -> bool:
    try:
        IndexArrays.open(prefix)
    except IndexedDatasetError:
        return False
    return True


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _documents(training: TrainingTokenizer, prefix: str, shared_by: int) -> list[str]:
    """Return the texts of documents, if it is the tokenizer that their ids are from."""
    number = max(1, _DOCUMENTS // shared_by)
    dataset = IndexArrays.open(prefix)
    decoded = list(decode_documents(dataset, training.built, number, _DOCUMENT_TOKENS))
    (added,) = training.encode([""])
    starts = [(document.text, document.ids[:_START]) for document in decoded if len(document.ids) > _START]
    if not added and len(starts) >= _ENOUGH:  # a tokenizer that adds tokens to a text finds them in it too
        again = [ids[:_START] for ids in training.encode([text for text, _ in starts])]
        same = sum(ids == start for ids, (_, start) in zip(again, starts, strict=True))
        if same * _ENOUGH < len(starts):
            raise UsageError(
                f"the data of {prefix} are not from {training}: it gives the ids of {same} of {len(starts)} "
                f"documents; the first begins {starts[0][1][:5]}, and its text would {again[0][:5]}"
            )
    return [document.text for document in decoded]
