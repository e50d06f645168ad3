"""Marks of every Unicode version are normalized as Megatron's tokenizer does it."""

from __future__ import annotations

import argparse
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_periln.data.tokenizers.encoders import choose_encoder, selection
from megatron_periln.data.tokenizers.encoders.gigatoken import GigatokenEncoder
from megatron_periln.data.tokenizers.megatron_tokenizer import add_tokenizer_args, build_tokenizer
from megatron_periln.data.tokenizers.resolve import wrap_tokenizer
from tests.data.tokenizers.encoder_tokenizers import BYTES, encode, needs_gigatoken, nfc, train

try:
    import unicodedata2 as newest
except ImportError:
    newest = unicodedata

POINTS = (*range(0x80, 0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE0200))
MARKS = [chr(point) for point in POINTS if newest.category(chr(point)).startswith("M")]
PAIRS = [
    "".join(chr(int(number, 16)) for number in parts)
    for parts in (newest.decomposition(chr(point)).split() for point in POINTS)
    if len(parts) == 2 and "<" not in parts[0]
]
NEW_PAIRS = ["\U00011935\U00011930", "\U0001611e\U0001611e", "\U00016d67\U00016d67", "\U00011382\U000113c9"]
"""Of Unicode 13 and 16."""


def metaspace_nfc() -> Any:
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.NFC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *BYTES]
    return train(tokenizer, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))


@needs_gigatoken
@pytest.mark.parametrize(("make", "encoder"), [(nfc, "gigatoken"), (metaspace_nfc, "tokenizers")])
def test_all_marks(make: Any, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(selection, "_differing", {})
    monkeypatch.setattr(
        "megatron_periln.data.tokenizers.encoders.characters.ASSIGNABLE", (list(map(ord, MARKS)),)
    )
    PreTrainedTokenizerFast(tokenizer_object=make()).save_pretrained(tmp_path)
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path)]
    args = add_tokenizer_args(argparse.ArgumentParser()).parse_args(flags)
    tokenizer = wrap_tokenizer(build_tokenizer(args), args)
    choice = choose_encoder(tokenizer)
    chosen = choice.encoder
    assert chosen.name == encoder, choice.notes
    assert len(MARKS) > 2000 and len(PAIRS) > 1000
    texts = [text for mark in MARKS for text in (f"a{mark}\u0334", f"a\u0345{mark}", f"e{mark}\u0301", mark)]
    texts += [f"x{left}{right} y" for left, right in pairwise(MARKS)]
    texts += [f"a {pair}" for pair in (*PAIRS, *NEW_PAIRS)]
    inner: Any = tokenizer.megatron_tokenizer()
    expected = inner._tokenizer.tokenizer(texts).input_ids
    assert [list(inner.tokenize(text)) for text in texts[::500]] == expected[::500]
    assert encode(chosen, texts) == expected
    if encoder != "gigatoken":
        return
    bare = encode(GigatokenEncoder(tokenizer), texts)
    wrong = {text for text, left, right in zip(texts, bare, expected, strict=True) if left != right}
    assert len({mark for mark in MARKS if f"a{mark}\u0334" in wrong}) > 50
    assert {f"a {pair}" for pair in NEW_PAIRS} <= wrong
