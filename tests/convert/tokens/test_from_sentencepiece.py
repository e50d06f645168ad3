"""The tokenizer.json made of a SentencePiece model gives SentencePiece's ids."""

import json

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from megatron_periln.convert.tokens.from_sentencepiece import suspects, tokenizer_json
from megatron_periln.convert.tokens.json_parts import InexpressibleError
from megatron_periln.convert.tokens.sentencepiece_model import Kind, SentencePieceModel
from tests.convert.tokens.kinds import LINES, QUICKSTART, sentencepiece_model, texts, with_kind, with_pieces

KEEP = {"remove_extra_whitespaces": False}
DEFINED = {"user_defined_symbols": ["<tool>", "self", "<|im_end|>"]}
UNIGRAM = {  # pieces of two characters, of which none is another's double
    "model_type": "unigram",
    "max_sentencepiece_length": 1,
    "required_chars": "0123456789ABCDEF<x>/",
}
MODELS = {
    "quickstart": QUICKSTART,
    "spaces kept": KEEP,
    "spaces removed": {},
    "without bytes": {"byte_fallback": False},
    "no dummy prefix": {**KEEP, "add_dummy_prefix": False},
    "no dummy prefix, defined": {
        **KEEP,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<tool>", "self", "\n", "  ", "    "],
    },
    "defined": DEFINED,
    "defined, control": {**DEFINED, "control_symbols": ["<ctl>", "return"], "pad_id": 3},
    "words together": {**KEEP, "split_by_whitespace": False, "split_by_unicode_script": False},
    "digits, white space": {**KEEP, "split_digits": True, "allow_whitespace_only_pieces": True},
    "characters": {"model_type": "char"},
    "characters, defined": {"model_type": "char", **DEFINED},
    "unigram": UNIGRAM,
    "unigram, defined": {**UNIGRAM, **DEFINED},
}


def differing(model, content, mixtures=1500):
    """Return the texts that get other ids."""
    processor = SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    read = SentencePieceModel.read(model)
    special = read.texts(*(kind for kind in Kind if kind not in (Kind.NORMAL, Kind.BYTE)))
    every = texts(special, [text.replace("▁", " ") for text in read.texts(*Kind)], mixtures)
    found = [encoding.ids for encoding in tokenizer.encode_batch(every)]
    expected = processor.encode(every)
    assert len(every) > 2000
    return [text for text, left, right in zip(every, found, expected, strict=True) if left != right]


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_sentencepieces(name):
    model = sentencepiece_model(**MODELS[name])
    assert differing(model, tokenizer_json(SentencePieceModel.read(model))) == []


def test_ten_thousand_texts():
    model = sentencepiece_model(**QUICKSTART)
    assert differing(model, tokenizer_json(SentencePieceModel.read(model)), 10_000) == []


def test_pieces_appended_with_the_best_score():
    model = with_pieces(sentencepiece_model(**QUICKSTART), "▁self.width", "tion▁is")
    read = SentencePieceModel.read(model)
    assert "▁self.width" in read.texts(Kind.NORMAL)
    assert differing(model, tokenizer_json(read)) == []


def first_split_alone(content):
    content["pre_tokenizer"]["pretokenizers"] = content["pre_tokenizer"]["pretokenizers"][:1]


def no_prefix(content):
    content["normalizer"]["normalizers"] = content["normalizer"]["normalizers"][1:]


CHANGES = {
    "not split": lambda content: content.update(pre_tokenizer=None),
    "not taken whole": lambda content: content["model"].update(ignore_merges=False),
    "control pieces found after defined ones": first_split_alone,
    "no prefix": no_prefix,
    "no bytes": lambda content: content["model"].update(byte_fallback=False),
    "merges": lambda content: content["model"]["merges"].reverse(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_part_is_needed(name):
    """The negative control."""
    model = sentencepiece_model(**{**QUICKSTART, "user_defined_symbols": ["\n", "<tool>"]})
    content = tokenizer_json(SentencePieceModel.read(model))
    every = ["<tool>", "\n</s>", "a", "漢", LINES[0]]
    for change, same in ((lambda _: None, True), (CHANGES[name], False)):
        change(content)
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.encode_special_tokens = True
        ids = [tokenizer.encode(text).ids for text in every]
        assert (ids == SentencePieceProcessor(model_proto=model).encode(every)) is same


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"model_type": "word", "byte_fallback": False}, "model_type word"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_rules_without_an_expression(options, rule):
    model = sentencepiece_model(**options)
    with pytest.raises(InexpressibleError, match=rule):
        tokenizer_json(SentencePieceModel.read(model))


def test_a_model_that_differs_names_what_may_be_why():
    plain = sentencepiece_model(**KEEP)
    assert suspects(SentencePieceModel.read(plain)) == "none that is known"
    unused = with_kind(plain, "▁self", Kind.UNUSED)
    assert "UNUSED" in suspects(SentencePieceModel.read(unused))
    rules = suspects(SentencePieceModel.read(sentencepiece_model(normalization_rule_name="nfkc")))
    assert rules == "the normalization rule nfkc"
    assert "32 bits" in suspects(SentencePieceModel.read(sentencepiece_model(model_type="unigram")))


def test_what_is_no_model():
    for content in (b"{}", b"\x0a\xff\xff", b"\x0a\x05abc", bytes([0x07])):
        with pytest.raises(ValueError, match="not a SentencePiece model"):
            SentencePieceModel.read(content)
