"""What Megatron's tokenizer really does, so that it can be done again without importing Megatron."""

from __future__ import annotations

import hashlib
import json
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_periln.data.tokenizers import cache as tokenizer_cache
from megatron_periln.data.tokenizers.megatron_tokenizer import (
    Tokenizer,
    add_tokenizer_args,
    build_tokenizer,
    check_tokenizer_files,
    end_of_document,
)
from megatron_periln.data.tokenizers.parts import take_apart
from megatron_periln.data.tokenizers.probes import probe_texts
from megatron_periln.errors import PreprocessError

__all__ = ["ResolvedTokenizer", "resolve_tokenizer", "wrap_tokenizer"]


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
        ``template`` (the ids put before and after a text), ``obstacle`` (why gigatoken is not exact);
        tiktoken: ``pattern``, ``special_tokens`` (the first ids; ranks follow).
    accelerated
        The tokenizer in the format of the fast encoder where making that takes time.
    differing
        Code points that the fast encoder takes for another kind of character than the library does; None
        where that could not be found out.
    probes
        Texts with the token ids that Megatron's tokenizer gives them.
    args
        The tokenizer flags, None for a tokenizer that was given as an object.
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
    probes: tuple[tuple[str, list[int]], ...] = field(default=(), repr=False)
    args: Namespace | None = field(default=None, repr=False)
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


def resolve_tokenizer(args: Namespace) -> ResolvedTokenizer:
    """Find out what the tokenizer flags describe.

    The first time, Megatron builds the tokenizer. What it is made of is kept in a cache
    (`tokenizer_cache`), and later calls import neither torch nor Megatron.

    Parameters
    ----------
    args
        The flags of ``add_tokenizer_args``.

    Raises
    ------
    PreprocessError
        If a file is missing or Megatron cannot build the tokenizer from what it holds.
    """
    check_tokenizer_files(args)
    flags = vars(add_tokenizer_args(ArgumentParser()).parse_args([]))
    key = tokenizer_cache.content_key(args, flags)
    if key and (found := _from_entry(key, args)):
        return found
    tokenizer = build_tokenizer(args)
    resolved = wrap_tokenizer(tokenizer, args, key=key)
    # Not if the files changed meanwhile, except by the hub's download.
    after = tokenizer_cache.content_key(args, flags)
    if after and (key is None or after == key) and resolved.kind != "megatron":
        tokenizer_cache.write_entry(after, _to_entry(resolved))
    return resolved


def wrap_tokenizer(
    tokenizer: Tokenizer, args: Namespace | None = None, *, key: str | None = None
) -> ResolvedTokenizer:
    """Find out what a tokenizer of Megatron's is made of.

    Parameters
    ----------
    tokenizer
        Megatron's object; any other object with its methods becomes one of kind ``megatron``.
    args
        The flags it was built from.
    key
        What identifies its files.
    """
    try:
        eod: int | None = end_of_document(tokenizer)
    except PreprocessError:
        eod = None
    parts = take_apart(tokenizer)
    kind, payload, settings = parts.kind, parts.payload, parts.settings
    name = args.tokenizer_type if args else type(tokenizer).__name__
    identity: list[Any] = [kind, tokenizer.vocab_size, eod, settings, tokenizer_cache.versions()]
    probes: list[tuple[str, list[int]]] = []
    if kind == "megatron":
        identity += [
            name,
            key,
            None if key or not args else sorted((k, str(v)) for k, v in vars(args).items()),
        ]
    else:
        probes = _probe(tokenizer, probe_texts(parts.special_tokens, parts.vocabulary))
        identity += [hashlib.sha256(payload).hexdigest(), probes]
    model = (args.tokenizer_model or args.vocab_file) if args else None
    resolved = ResolvedTokenizer(
        kind=kind,
        vocab_size=int(tokenizer.vocab_size),
        eod=eod,
        digest=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        description=f"{name} {model}" if model else name,
        payload=payload,
        settings=settings,
        accelerated=_accelerate(kind, payload),
        probes=tuple(probes),
        args=args,
        _built=[tokenizer],
    )
    return replace(resolved, differing=_differing(resolved))


def _probe(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[str, list[int]]]:
    probes = []
    for text in texts:
        try:
            probes.append((text, [int(token) for token in tokenizer.tokenize(text)]))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic in a tokenizer written in Rust is no Exception
            continue
    return probes


def _accelerate(kind: str, payload: bytes) -> bytes | None:
    if kind != "sentencepiece":
        return None
    from megatron_periln.data.tokenizers.encoders.gigatoken import convert_sentencepiece

    return convert_sentencepiece(payload)


def _differing(resolved: ResolvedTokenizer) -> tuple[int, ...] | None:
    from megatron_periln.data.tokenizers.encoders.selection import characters_to_avoid

    return characters_to_avoid(resolved)


def _to_entry(resolved: ResolvedTokenizer) -> dict[str, bytes]:
    facts = {
        name: getattr(resolved, name)
        for name in ("kind", "vocab_size", "eod", "digest", "description", "settings", "differing")
    }
    files = {
        "facts.json": json.dumps(facts).encode(),
        "payload": resolved.payload,
        "probes.json": json.dumps(resolved.probes).encode(),
    }
    return files if resolved.accelerated is None else {**files, "accelerated": resolved.accelerated}


def _from_entry(key: str, args: Namespace) -> ResolvedTokenizer | None:
    files = tokenizer_cache.read_entry(key)
    if files is None:
        return None
    try:
        facts = json.loads(files["facts.json"])
        differing = facts.pop("differing")
        return ResolvedTokenizer(
            **facts,
            differing=None if differing is None else tuple(differing),
            payload=files["payload"],
            accelerated=files.get("accelerated"),
            probes=tuple((text, ids) for text, ids in json.loads(files["probes.json"])),
            args=args,
        )
    except (KeyError, ValueError, TypeError):
        return None
