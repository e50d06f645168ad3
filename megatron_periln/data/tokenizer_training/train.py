"""Training of tokenizers that Megatron loads: SentencePiece models and Hugging Face folders."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from megatron_periln.data.tokenizer_training.trained import FOLDER_FILES, HuggingFaceFiles, SentencePieceModel
from megatron_periln.errors import PreprocessError

__all__ = ["EOS_TOKEN", "PAD_TOKEN", "SPLITS", "train_huggingface", "train_sentencepiece"]

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"

SPLITS = {
    # GPT-4's and Llama 3's, in the spelling of Llama 3's tokenizer.json, by which fast encoders know it.
    "llama3": "|".join(
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # endings of English words
            r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with one space or mark before it
            r"\p{N}{1,3}",  # up to three digits
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # marks, and the line ends after them
            r"\s*[\r\n]+",  # white space up to line ends
            r"\s+(?!\S)",  # white space but for the last, which belongs to the word
            r"\s+",
        )
    ),
    "gpt2": None,  # built into the byte-level step of the tokenizers library
}
"""Patterns that split text into words, within which byte pairs are merged."""

_SENTENCEPIECE_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


def train_sentencepiece(
    texts: Sequence[bytes],
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    byte_fallback: bool = True,
    special_tokens: Sequence[str] = (),
) -> SentencePieceModel:
    """Train a SentencePiece model that keeps text as it is: spaces, line ends and all.

    Ids 0 to 3 are ``<unk>``, ``<s>``, ``</s>`` (Megatron's end-of-document token) and ``<pad>``; then come
    the special tokens, then 256 bytes.

    Parameters
    ----------
    texts
        Pieces of text in UTF-8.
    vocab_size
        Number of ids in all.
    model_type
        How pieces are chosen.
    byte_fallback
        Spell characters that are not in the vocabulary, line ends among them, as bytes. Without it they
        become ``<unk>``.
    special_tokens
        Each becomes one token wherever it stands in a text.

    Raises
    ------
    PreprocessError
        If the vocabulary is too small for the characters, or too large for the text.
    """
    import sentencepiece  # one library is needed of the two, and not for --help

    _check_special([*_SENTENCEPIECE_SPECIAL, *special_tokens])
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=byte_fallback,
            user_defined_symbols=list(special_tokens),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            train_extremely_large_corpus=sum(map(len, texts)) > 1 << 30,
            num_threads=len(os.sched_getaffinity(0)),
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise PreprocessError(_sentencepiece_reason(vocab_size, str(error))) from error
    return SentencePieceModel(model.getvalue())


def train_huggingface(
    texts: Sequence[bytes],
    *,
    vocab_size: int,
    split: str = "llama3",
    eos_token: str = EOS_TOKEN,
    special_tokens: Sequence[str] = (),
) -> HuggingFaceFiles:
    """Train a byte-level BPE tokenizer in the format of Hugging Face.

    Ids 0 and 1 are ``eos_token`` (Megatron's end-of-document token) and ``<|pad|>``; then come the special
    tokens, then 256 bytes.

    Parameters
    ----------
    texts
        Pieces of text in UTF-8.
    vocab_size
        Number of ids in all.
    split
        One of ``SPLITS``.
    eos_token
        The end-of-document token.
    special_tokens
        Each becomes one token wherever it stands in a text.

    Raises
    ------
    PreprocessError
        If the vocabulary is too small for the bytes, or too large for the text.
    """
    # One library is needed of the two, and not for --help.
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [eos_token, PAD_TOKEN, *special_tokens]
    _check_special(special)
    least = 256 + len(special)
    if vocab_size < least:
        raise PreprocessError(
            f"--vocab-size {vocab_size}: at least {least} are needed, for bytes and special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    pattern = SPLITS[split]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = (
        byte_level
        if pattern is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level])
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode("utf-8") for text in texts), trainer)
    if (learned := tokenizer.get_vocab_size()) < vocab_size:
        raise PreprocessError(_too_large(vocab_size, learned))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "pad_token": PAD_TOKEN,
        "additional_special_tokens": list(special_tokens),
        "clean_up_tokenization_spaces": False,
    }
    contents = (tokenizer.to_str(pretty=True), json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return HuggingFaceFiles(dict(zip(FOLDER_FILES, contents, strict=True)))


def _sentencepiece_reason(vocab_size: int, message: str) -> str:
    """Return SentencePiece's reason in the words of our flags."""
    if least := re.search(rf"required_chars\. {vocab_size} vs (\d+)", message):
        return f"--vocab-size {vocab_size}: at least {least[1]} are needed for this text's characters"
    if most := re.search(r"size too high .* value <= (\d+)", message):
        return _too_large(vocab_size, int(most[1]))
    reason = message.split("] ")[-1].strip() or message
    return f"SentencePiece cannot learn {vocab_size} ids from this text: {' '.join(reason.split())}"


def _too_large(vocab_size: int, most: int) -> str:
    return (
        f"--vocab-size {vocab_size}: only {most} can be learned from this text; "
        f"ask for fewer, or give more text or a larger --sample-bytes"
    )


def _lines(texts: Iterable[bytes]) -> Iterator[str]:
    """Yield lines, as SentencePiece takes no line ends."""
    for text in texts:
        yield from filter(None, text.decode("utf-8").split("\n"))


def _check_special(tokens: Sequence[str]) -> None:
    seen = set[str]()
    for token in tokens:
        if not token.strip():
            raise PreprocessError("--special-tokens: a token is empty or white space")
        if token in seen:
            raise PreprocessError(f"--special-tokens: {token} is there twice, or one that is always there")
        seen.add(token)
