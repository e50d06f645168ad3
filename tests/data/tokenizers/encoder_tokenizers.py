"""Tokenizers of all kinds, small and trained on Python's own sources."""

from __future__ import annotations

import argparse
import base64
import functools
import importlib.util
import inspect
import json
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_periln.data.tokenizers.encoders.gigatoken import TIKTOKEN_SCHEMES
from megatron_periln.data.tokenizers.megatron_tokenizer import add_tokenizer_args, build_tokenizer
from megatron_periln.data.tokenizers.resolve import wrap_tokenizer
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer

TEXT = [line for line in inspect.getsource(textwrap).splitlines() if line.strip()] * 2
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
HAS_GIGATOKEN = importlib.util.find_spec("gigatoken") is not None
needs_gigatoken = pytest.mark.skipif(not HAS_GIGATOKEN, reason="needs gigatoken")


def byte_level(pattern: str | None = None, bos: bool = False, normalizer: Any = None, **options: Any) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(**options))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern:
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), split])
    tokenizer.pre_tokenizer = split
    if normalizer:
        tokenizer.normalizer = normalizer
    train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<s>", "</s>", "<|im_start|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        template = processors.TemplateProcessing(
            single="<s> $A </s> </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return tokenizer


def added(tokenizer: Any) -> Any:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True)])
    tokenizer.add_tokens([AddedToken("Plain", normalized=True), AddedToken("<x>"), AddedToken("<x>y")])
    return tokenizer


def added_words(tokenizer: Any, **options: bool) -> Any:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("word", **options)])
    return tokenizer


def lowercase() -> Any:
    from tokenizers import normalizers

    return byte_level(normalizer=normalizers.Lowercase())


def metaspace(pre_tokenizer: bool) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *BYTES]
    return train(tokenizer, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))


def word_piece() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    special = ["[UNK]", "[CLS]", "[SEP]"]
    return train(
        tokenizer, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )


def unigram() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>"]
    return train(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=400, unk_token="<unk>", special_tokens=special, show_progress=False
        ),
    )


def train(tokenizer: Any, trainer: Any) -> Any:
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@functools.cache
def ranks() -> list[dict[str, Any]]:
    from tokenizers.decoders import ByteLevel

    tokenizer = byte_level(next(iter(TIKTOKEN_SCHEMES)))
    numbers = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number > 2)
    merged = [ByteLevel().decode([token]).encode() for _, token in numbers if len(token) > 1]
    return [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": ""}
        for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *merged])
    ]


def nfc() -> Any:
    from tokenizers import normalizers

    return byte_level(LLAMA, normalizer=normalizers.NFC())


HUGGING_FACE: dict[str, Callable[[], Any]] = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level(LLAMA, ignore_merges=True),
    "nfc": nfc,
    "bos": lambda: byte_level(LLAMA, bos=True),
    "added": lambda: added(byte_level()),
    "added words": lambda: added_words(byte_level(), single_word=True),
    "added normalized": lambda: added_words(nfc(), normalized=True),
    "lower case": lowercase,
    "own words": lambda: byte_level(r"\w+|\W"),
    "llama2": lambda: metaspace(pre_tokenizer=False),
    "metaspace": lambda: metaspace(pre_tokenizer=True),
    "word pieces": word_piece,
    "unigram": unigram,
}
PIECES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "normalized": {"model_type": "bpe", "byte_fallback": True},
    "defined": {
        **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
        **{"user_defined_symbols": ["<tool>", "self"]},
    },
    "without bytes": {"model_type": "bpe"},
    "unigram pieces": {"byte_fallback": True},
    "characters": {"model_type": "char"},
}
FIXTURES = ["huggingface", "sentencepiece", "tiktoken"]
EXACT = {
    "added",
    "gpt2",
    "llama3",
    "nfc",
    "bos",
    "llama2",
    "metaspace",
    "llama",
    "huggingface",
    "tiktoken bpe",
}
ALL = [*HUGGING_FACE, "bare bos", "special as text", *PIECES, "tiktoken v1", "tiktoken bpe", *FIXTURES]


@pytest.fixture(scope="session", name="flags")
def flags_fixture(
    tokenizers: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list]:
    """Make the tokenizer of a name; return its flags."""
    folder = tmp_path_factory.mktemp("encoders")

    def make(name: str) -> list[str]:
        if name in tokenizers:
            return tokenizers[name]
        if name == "tiktoken v1":
            return [*tokenizers["tiktoken"], "--tiktoken-pattern", "v1"]
        path = folder / name
        if name == "tiktoken bpe":
            path.with_suffix(".json").write_text(json.dumps(ranks()))
            size = ["--vocab-size", str(10 + len(ranks())), "--tiktoken-num-special-tokens", "10"]
            return ["--tokenizer-type", "TikTokenizer", "--tokenizer-model", f"{path}.json", *size]
        if name in PIECES:
            import sentencepiece

            options = {"vocab_size": 600 if PIECES[name].get("byte_fallback") else 100, **PIECES[name]}
            if name == "llama":
                options["remove_extra_whitespaces"] = False
            with path.open("wb") as stream:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(TEXT),
                    model_writer=stream,
                    minloglevel=2,
                    hard_vocab_limit=False,
                    **options,
                )
            return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(path)]
        from transformers import PreTrainedTokenizerFast

        more = ["--tokenizer-hf-no-include-special-tokens"] if name == "bare bos" else []
        backend = HUGGING_FACE.get(name, HUGGING_FACE["bos"])()
        as_text = {"split_special_tokens": True} if name == "special as text" else {}
        PreTrainedTokenizerFast(tokenizer_object=backend, **as_text).save_pretrained(path)
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(path), *more]

    return make


@pytest.fixture(scope="session", name="resolved")
def resolved_fixture(flags: Callable[[str], list]) -> Callable[[str], ResolvedTokenizer]:
    known: dict[str, ResolvedTokenizer] = {}

    def resolve(name: str) -> ResolvedTokenizer:
        if name not in known:
            args = add_tokenizer_args(argparse.ArgumentParser()).parse_args(flags(name))
            known[name] = wrap_tokenizer(build_tokenizer(args), args)
        return known[name]

    return resolve


def encode(encoder: Any, texts: list[str]) -> list[list[int]]:
    ids, lengths = encoder.encode(texts)
    assert ids.dtype == np.uint32
    assert lengths.dtype == np.int64
    assert lengths.sum() == len(ids)
    return [row.tolist() for row in np.split(ids, np.cumsum(lengths))[:-1]]
