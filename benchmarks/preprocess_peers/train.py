"""The tokenizers: trained on the head of the corpus, and kept in the work folder."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess_peers.corpus import documents

__all__ = ["END_OF_TEXT", "TOKENIZERS", "Tokenizer", "tokenizer_files", "with_joined_merges"]

END_OF_TEXT = "<|endoftext|>"
TOKENIZERS = ("hf-32k", "hf-128k", "tiktoken", "sentencepiece")

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TIKTOKEN_SPECIALS = 1000  # Megatron's default
_CHARACTERS = {"bpe": 30_000_000, "sentencepiece": 6_000_000}


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's files.

    Parameters
    ----------
    name
        One of ``TOKENIZERS``.
    model
        What the raw encoder loads: tokenizer.json, a ``.tiktoken`` file or a SentencePiece model.
    flags
        Megatron's flags for it.
    """

    name: str
    model: Path
    flags: list[str]

    @property
    def kind(self) -> str:
        """``hf``, ``tiktoken`` or ``sentencepiece``."""
        return self.name.split("-")[0]

    @property
    def vocab_size(self) -> int:
        """Number of entries of a ``hf`` tokenizer."""
        return len(json.loads(self.model.read_text())["model"]["vocab"])


def tokenizer_files(name: str, folder: Path, corpus: Path) -> Tokenizer:
    """Return the files of tokenizer ``name`` in ``folder``, trained if they are not there."""
    if name == "sentencepiece":
        model = _once(folder / "sentencepiece.model", lambda path: _train_sentencepiece(path, corpus))
        return Tokenizer(name, model, _flags("SentencePieceTokenizer", model))
    large = _once(folder / "hf-128k/tokenizer.json", lambda path: _train_bpe(path, corpus, 128_000))
    if name == "hf-128k":
        return Tokenizer(name, large, _flags("HuggingFaceTokenizer", large.parent))
    if name == "hf-32k":
        small = _once(folder / "hf-32k/tokenizer.json", lambda path: _cut_bpe(path, large, 32_000))
        return Tokenizer(name, small, _flags("HuggingFaceTokenizer", small.parent))
    ranks = _once(folder / "tiktoken.json", lambda path: _write_tiktoken(path, large))
    size = ranks.with_suffix(".tiktoken").read_bytes().count(b"\n") + _TIKTOKEN_SPECIALS
    flags = [*_flags("TikTokenizer", ranks), "--vocab-size", str(size)]
    return Tokenizer(name, ranks.with_suffix(".tiktoken"), flags)


def with_joined_merges(tokenizer: Tokenizer) -> Path:
    """Return the tokenizer as a tokenizer.json for ``tokenizers`` before 0.20."""

    def write(path: Path) -> None:
        content = json.loads(tokenizer.model.read_text())
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        path.write_text(json.dumps(content))

    return _once(tokenizer.model.parent.with_name(f"{tokenizer.name}-joined") / "tokenizer.json", write)


def _flags(kind: str, model: Path) -> list[str]:
    return ["--tokenizer-type", kind, "--tokenizer-model", str(model)]


def _once(path: Path, make: Callable[[Path], None]) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
    return path


def _train_bpe(path: Path, corpus: Path, vocab_size: int) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents(corpus, _CHARACTERS["bpe"]), trainer)
    _save(bpe, path)


def _cut_bpe(path: Path, large: Path, vocab_size: int) -> None:
    """Keep the first entries and the merges that make them, which is what training to them gives."""
    import tokenizers

    content = json.loads(large.read_text())
    model = content["model"]
    model["vocab"] = {token: rank for token, rank in model["vocab"].items() if rank < vocab_size}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    _save(tokenizers.Tokenizer.from_str(json.dumps(content)), path)


def _save(bpe: Any, path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT).save_pretrained(path.parent)


def _write_tiktoken(path: Path, large: Path) -> None:
    """Write the entries of ``large`` as ranks: Megatron's JSON, and a .tiktoken file beside it."""
    entries = json.loads(large.read_text())["model"]["vocab"]
    to_byte = {character: byte for byte, character in _byte_characters()}
    learned = [bytes(to_byte[character] for character in entry) for entry in entries if entry != END_OF_TEXT]
    tokens = [*(bytes([byte]) for byte in range(256)), *(token for token in learned if len(token) > 1)]
    encoded = [base64.b64encode(token).decode() for token in tokens]
    lines = "".join(f"{token} {rank}\n" for rank, token in enumerate(encoded))
    path.with_suffix(".tiktoken").write_text(lines)
    records = [
        {"rank": rank, "token_bytes": encoded[rank], "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    path.write_text(json.dumps(records))


def _byte_characters() -> Iterator[tuple[int, str]]:
    """Yield GPT-2's character for each byte (``bytes_to_unicode``)."""
    others = 0
    for byte in range(256):
        if byte in range(33, 127) or byte in range(161, 173) or byte in range(174, 256):
            yield byte, chr(byte)
        else:
            yield byte, chr(256 + others)
            others += 1


def _train_sentencepiece(path: Path, corpus: Path) -> None:
    import sentencepiece

    text = documents(corpus, _CHARACTERS["sentencepiece"])
    lines = (line for document in text for line in document.splitlines() if line.strip())
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=stream,
            model_type="bpe",
            vocab_size=32_000,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4192,
            num_threads=2,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    partial.replace(path)
