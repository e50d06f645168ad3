"""The fastest encoder that gives Megatron's token ids."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

from megatron_periln.data.tokenizers.encoders.base import BatchEncoder, Encoded, EncoderUnavailableError
from megatron_periln.data.tokenizers.encoders.characters import (
    GuardedEncoder,
    differing_characters,
    differing_marks,
    unknown_characters,
    with_normalization_alone,
    with_telling_vocabulary,
)
from megatron_periln.data.tokenizers.encoders.gigatoken import GigatokenEncoder
from megatron_periln.data.tokenizers.encoders.libraries import (
    MegatronEncoder,
    SentencePieceEncoder,
    TikTokenEncoder,
    TokenizersEncoder,
)
from megatron_periln.data.tokenizers.encoders.pieces import PiecewiseEncoder
from megatron_periln.data.tokenizers.probes import vocabulary_texts
from megatron_periln.data.tokenizers.proofs import is_proven, remember
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer
from megatron_periln.errors import PreprocessError

__all__ = [
    "ENCODERS",
    "ChosenEncoder",
    "available_encoders",
    "characters_to_avoid",
    "choose_encoder",
    "difference_between",
    "difference_on_vocabulary",
    "first_difference",
    "likely_reference",
    "open_encoder",
]

ENCODERS: dict[str, Callable[[ResolvedTokenizer], BatchEncoder]] = {
    "gigatoken": GigatokenEncoder,
    "tokenizers": TokenizersEncoder,
    "sentencepiece": SentencePieceEncoder,
    "tiktoken": TikTokenEncoder,
    "megatron": MegatronEncoder,
}
"""The encoders by name."""

_differing: dict[tuple[str, bytes, str], tuple[int, ...]] = {}
_VOCABULARY_BATCH = 1 << 14
_BATCH_SIZES = (1, 2, 3, 7, 64)


@dataclass(frozen=True)
class ChosenEncoder:
    """An encoder and what its work is checked against.

    Parameters
    ----------
    encoder
        Gives Megatron's ids for all probes.
    reference
        Another implementation, loaded at first use; None where ``encoder`` is what Megatron runs.
    notes
        A line for each faster encoder that was not taken.
    """

    encoder: BatchEncoder
    reference: BatchEncoder | None
    notes: list[str] = field(default_factory=list)


def available_encoders(resolved: ResolvedTokenizer) -> list[str]:
    """Return the names of the encoders that may serve a tokenizer, the fastest first."""
    if resolved.kind == "megatron":
        return ["megatron"]
    fast = ["gigatoken"] if importlib.util.find_spec("gigatoken") else []
    return [*fast, resolved.kind, "megatron"]


def open_encoder(resolved: ResolvedTokenizer, name: str) -> BatchEncoder:
    """Return an encoder by its name.

    Raises
    ------
    PreprocessError
        If there is none of that name for this tokenizer.
    """
    names = available_encoders(resolved)
    try:
        if name in names:
            encoder = ENCODERS[name](resolved)
            return _guarded(encoder, resolved) if name == "gigatoken" else encoder
        missing = name == "gigatoken" and resolved.kind != "megatron"
        reason = (
            "it is not installed: pip install gigatoken" if missing else f"choose from {', '.join(names)}"
        )
    except EncoderUnavailableError as error:
        reason = str(error)
    raise PreprocessError(f"encoder {name} cannot serve {resolved.description}: {reason}")


def choose_encoder(resolved: ResolvedTokenizer, requested: str | None = None) -> ChosenEncoder:
    """Return the fastest encoder that gives the ids which Megatron's tokenizer gave for the probes.

    What gave them once is not asked again, as long as everything is as it was (`proofs`).

    Parameters
    ----------
    resolved
        The tokenizer.
    requested
        The name of the only encoder to try.

    Raises
    ------
    PreprocessError
        If the requested encoder cannot serve the tokenizer or differs from Megatron's.
    """
    notes: list[str] = []
    for name in [requested] if requested else available_encoders(resolved):
        try:
            encoder = open_encoder(resolved, name)
            encoder.load()
            proven = name == "megatron" or is_proven(resolved, name)
            problem = None if proven else _difference_from_probes(encoder, resolved)
            if not proven and problem is None:
                remember(resolved, name)
        except EncoderUnavailableError as error:
            problem = f"encoder {name} cannot serve {resolved.description}: {error}"
        except PreprocessError as error:
            if name == "megatron":
                raise
            problem = str(error)
        if problem is None:
            return ChosenEncoder(
                encoder, _reference(encoder, resolved) if name == "gigatoken" else None, notes
            )
        if requested:
            raise PreprocessError(problem)
        notes.append(problem)
    raise AssertionError("Megatron's own tokenizer is always an encoder")


def likely_reference(resolved: ResolvedTokenizer, requested: str | None = None) -> BatchEncoder | None:
    """Return what the encoder of `choose_encoder` will be checked against, where that can be told before.

    Nothing is loaded yet.
    """
    known = requested in (None, "gigatoken") and "gigatoken" in available_encoders(resolved)
    if not known or not is_proven(resolved, "gigatoken"):
        return None
    return _exact(resolved)


def first_difference(encoder: BatchEncoder, reference: BatchEncoder, texts: list[str]) -> str | None:
    """Return in one line how two encoders differ on the first text on which they do; None if on none."""
    return difference_between(
        texts, (encoder.name, encoder.encode(texts)), (reference.name, reference.encode(texts))
    )


def difference_between(
    texts: list[str], ours: tuple[str, Encoded], theirs: tuple[str, Encoded]
) -> str | None:
    """Return the same of what two encoders, by name, gave for ``texts``."""
    found = _compare(texts, ours[1], theirs[1])
    return found and f"{found[0]} {ours[0]} gives {found[1]}, {theirs[0]} {found[2]}"


def characters_to_avoid(resolved: ResolvedTokenizer) -> tuple[int, ...] | None:
    """Return the code points that gigatoken takes for something else than the library does.

    None if that cannot be found out. It takes some seconds.
    """
    if "gigatoken" not in available_encoders(resolved):
        return None
    try:
        GigatokenEncoder(resolved)
        found: set[int] = set()
        for telling, differing in (
            (with_telling_vocabulary(resolved), differing_characters),
            (with_normalization_alone(resolved), differing_marks),
        ):
            if telling is None:
                continue
            split = (telling.kind, telling.payload, repr(telling.settings))
            if split not in _differing:
                exact = ENCODERS[resolved.kind](telling)
                _differing[split] = tuple(differing(GigatokenEncoder(telling), exact))
            found.update(_differing[split])
        return tuple(sorted(found))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic in an encoder written in Rust is no Exception
        return None


def difference_on_vocabulary(resolved: ResolvedTokenizer, strings: Sequence[str]) -> str | None:
    """Return how gigatoken's ids differ from the library's on the entries of a vocabulary; None if nowhere.

    Each is encoded alone and with its neighbour, with and without a leading space. It takes some seconds.
    """
    if "gigatoken" not in available_encoders(resolved):
        return None
    try:
        encoder = _with_exact(GigatokenEncoder(resolved), resolved)
    except EncoderUnavailableError:
        return None
    exact = ENCODERS[resolved.kind](resolved)
    texts = vocabulary_texts(strings)
    try:
        for start in range(0, len(texts), _VOCABULARY_BATCH):
            if found := first_difference(encoder, exact, texts[start : start + _VOCABULARY_BATCH]):
                return found
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in an encoder written in Rust is no Exception
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None


def _guarded(encoder: BatchEncoder, resolved: ResolvedTokenizer) -> BatchEncoder:
    if resolved.differing is None:
        raise EncoderUnavailableError("it could not be found out how it splits texts")
    if resolved.unlike:
        raise EncoderUnavailableError(f"it is not exact for its vocabulary: {resolved.unlike}")
    return _with_exact(encoder, resolved)


def _with_exact(encoder: BatchEncoder, resolved: ResolvedTokenizer) -> BatchEncoder:
    characters = list(resolved.differing or ())
    if with_normalization_alone(resolved):
        characters += unknown_characters()
    if not characters:
        return encoder
    return GuardedEncoder(encoder, _exact(resolved), characters)


def _exact(resolved: ResolvedTokenizer) -> BatchEncoder:
    return PiecewiseEncoder(ENCODERS[resolved.kind](resolved), resolved)


def _reference(encoder: BatchEncoder, resolved: ResolvedTokenizer) -> BatchEncoder:
    """Return the library's own encoder, the one that ``encoder`` has loaded if it has."""
    return encoder.exact if isinstance(encoder, GuardedEncoder) else open_encoder(resolved, resolved.kind)


def _difference_from_probes(encoder: BatchEncoder, resolved: ResolvedTokenizer) -> str | None:
    probes = resolved.probes
    for part in (probes, *_batches(probes)):
        texts = [text for text, _ in part]
        rows = [ids for _, ids in part]
        expected = (
            np.array([token for ids in rows for token in ids], np.uint32),
            np.array([len(ids) for ids in rows], np.int64),
        )
        try:
            found = _compare(texts, encoder.encode(texts), expected)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in an encoder written in Rust is no Exception
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return f"encoder {encoder.name} fails on {resolved.description}: {reason}"
        if found:
            return (
                f"encoder {encoder.name} is not exact for {resolved.description}: "
                f"{found[0]} it gives {found[1]}, Megatron {found[2]}"
            )
    return None


def _batches(probes: Sequence[tuple[str, list[int]]]) -> Iterator[Sequence[tuple[str, list[int]]]]:
    start = 0
    for size in cycle(_BATCH_SIZES):
        if start >= len(probes):
            return
        yield probes[start : start + size]
        start += size


def _compare(texts: list[str], found: Encoded, expected: Encoded) -> tuple[str, str, str] | None:
    """Return where two results differ and the ids there of each."""
    if np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1]):
        return None
    rows = zip(texts, _rows(found, len(texts)), _rows(expected, len(texts)), strict=True)
    for text, left, right in rows:
        if not np.array_equal(left, right):
            shared = min(len(left), len(right))
            differs = np.flatnonzero(left[:shared] != right[:shared])
            at = int(differs[0]) if len(differs) else shared
            window = slice(max(0, at - 2), at + 4)
            shown = [str(row[window].tolist()) for row in (left, right)]
            return f"for {_short(text)} at token {at}", shown[0], shown[1]
    together = f"for {len(texts)} texts together"  # each the same, and more behind the last
    return together, f"{len(found[0])} ids", str(len(expected[0]))


def _rows(encoded: Encoded, number: int) -> list[np.ndarray]:
    ids, lengths = encoded
    rows = np.split(ids, np.cumsum(lengths))[:-1]
    return [*rows[:number], *([np.empty(0, np.uint32)] * (number - len(rows)))]


def _short(text: str, limit: int = 60) -> str:
    shown = repr(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 15]}…{shown[-14:]}"
