"""From Megatron's tokenizer flags to a tokenizer as data, found out once and then read from the cache."""

from __future__ import annotations

import hashlib
import json
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from typing import Any

import orjson

from megatron_periln.data.tokenizers import cache
from megatron_periln.data.tokenizers.encoders.gigatoken import convert_sentencepiece
from megatron_periln.data.tokenizers.encoders.selection import characters_to_avoid, difference_on_vocabulary
from megatron_periln.data.tokenizers.megatron_tokenizer import (
    Tokenizer,
    add_tokenizer_args,
    build_tokenizer,
    check_tokenizer_files,
    end_of_document,
)
from megatron_periln.data.tokenizers.parts import take_apart
from megatron_periln.data.tokenizers.probes import probe_texts
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer
from megatron_periln.errors import PreprocessError

__all__ = ["resolve_tokenizer", "wrap_tokenizer"]


def resolve_tokenizer(args: Namespace) -> ResolvedTokenizer:
    """Find out what the tokenizer flags describe.

    The first time, Megatron builds the tokenizer. What it is made of is kept in a cache
    (`cache`), and later calls import neither torch nor Megatron.

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
    flags = _flags()
    key = cache.content_key(args, flags)
    if key and (found := _from_entry(key, args)):
        return found
    tokenizer = build_tokenizer(args)
    resolved = wrap_tokenizer(tokenizer, args)
    # Not if the files changed meanwhile, except by the hub's download.
    after = cache.content_key(args, flags)
    known = after and (key is None or after == key) and resolved.kind != "megatron"
    if known and after and cache.write_entry(after, _to_entry(resolved)):
        return replace(resolved, entry=after)
    return resolved


def _flags() -> dict[str, Any]:
    """Return the names of the tokenizer flags, with their defaults."""
    return vars(add_tokenizer_args(ArgumentParser()).parse_args([]))


def wrap_tokenizer(tokenizer: Tokenizer, args: Namespace | None = None) -> ResolvedTokenizer:
    """Find out what a tokenizer of Megatron's is made of.

    Parameters
    ----------
    tokenizer
        Megatron's object; any other object with its methods becomes one of kind ``megatron``.
    args
        The flags it was built from.
    """
    try:
        eod: int | None = end_of_document(tokenizer)
    except PreprocessError:
        eod = None
    parts = take_apart(tokenizer)
    kind, payload, settings = parts.kind, parts.payload, parts.settings
    name = args.tokenizer_type if args else type(tokenizer).__name__
    identity: list[Any] = [kind, tokenizer.vocab_size, eod]
    probes: list[tuple[str, list[int]]] = []
    if kind == "megatron":
        # Neither versions nor code: a run that is resumed, or datasets that are merged, may be of several.
        identity += [name, args and (cache.files_digest(args, _flags()) or cache.settings_of(args, _flags()))]
    else:
        # The sidecars of datasets hold digests in which one setting has its first name.
        first = {"obstacle" if name == "unsupported" else name: value for name, value in settings.items()}
        probes = _probe(tokenizer, probe_texts(parts.special_tokens, parts.vocabulary))
        identity += [first, cache.versions(), hashlib.sha256(payload).hexdigest(), probes]
    model = (args.tokenizer_model or args.vocab_file) if args else None
    resolved = ResolvedTokenizer(
        kind=kind,
        vocab_size=int(tokenizer.vocab_size),
        eod=eod,
        digest=hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest(),
        description=f"{name} {model}" if model else name,
        payload=payload,
        settings=settings,
        accelerated=convert_sentencepiece(payload) if kind == "sentencepiece" else None,
        probes=tuple(probes),
        args=args,
        _built=[tokenizer],
    )
    resolved = replace(resolved, differing=characters_to_avoid(resolved))
    return replace(resolved, unlike=difference_on_vocabulary(resolved, parts.strings))


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


def _to_entry(resolved: ResolvedTokenizer) -> dict[str, bytes]:
    facts = {
        name: getattr(resolved, name)
        for name in ("kind", "vocab_size", "eod", "digest", "description", "settings", "differing", "unlike")
    }
    files = {
        "facts.json": json.dumps(facts).encode(),
        "payload": resolved.payload,
        "probes.json": json.dumps(resolved.probes).encode(),
    }
    return files if resolved.accelerated is None else {**files, "accelerated": resolved.accelerated}


def _from_entry(key: str, args: Namespace) -> ResolvedTokenizer | None:
    files = cache.read_entry(key)
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
            probes=tuple((text, ids) for text, ids in orjson.loads(files["probes.json"])),
            args=args,
            entry=key,
        )
    except (KeyError, ValueError, TypeError):
        return None
