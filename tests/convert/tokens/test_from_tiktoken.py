"""The tokenizer.json made of a tiktoken vocabulary gives tiktoken's ids."""

import json

import pytest
from tokenizers import Regex, Tokenizer, normalizers

from megatron_periln.convert.tokens.from_tiktoken import tokenizer_json
from megatron_periln.convert.tokens.json_parts import InexpressibleError
from megatron_periln.convert.tokens.training_tokenizer import TrainingTokenizer
from megatron_periln.errors import PreprocessError
from tests.convert.tokens.kinds import parse, texts, tiktoken


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_ids_are_tiktokens(tmp_path, pattern):
    training = TrainingTokenizer.build(tiktoken(tmp_path, pattern))
    parts = training.parts
    content = tokenizer_json(parts.payload, parts.settings["pattern"], parts.settings["special_tokens"])
    every = texts(parts.special_tokens, training.token_texts(), 10_000)
    expected = training.encode(every)

    def ids():
        return [encoding.ids for encoding in Tokenizer.from_str(json.dumps(content)).encode_batch(every)]

    assert ids() == expected
    content["model"]["merges"].reverse()
    assert ids() != expected
    content["model"]["merges"].reverse()
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\P{L}+"
    assert ids() != expected


@pytest.mark.parametrize(
    ("name", "content"),
    [("tekken.json", '{"config": {}, "vocab": []}'), ("qwen.tiktoken", "IQ== 0\n"), ("other.json", "[{}]")],
)
def test_files_of_another_format(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    flags = parse("--tokenizer-type", "TikTokenizer", "--tokenizer-model", tmp_path / name)
    with pytest.raises(PreprocessError) as refused:
        TrainingTokenizer.build(flags)
    assert str(refused.value).startswith(
        "TikTokenizer cannot be built: AssertionError; it needs a .json with a list of rank, token_bytes and "
        "token_str that begins with the 256 bytes in order (of a tekken.json, its list vocab), and "
    )


def test_a_special_token_in_the_vocabulary_has_no_expression():
    with pytest.raises(InexpressibleError, match="the special token 'ab' is also a word"):
        tokenizer_json(b"YQ== 0\nYg== 1\nYWI= 2\n", "a", ["<s>", "ab"])


@pytest.mark.parametrize("name", [r"\p{L}", r"\p{N}", r"\p{Lu}", r"\p{Lm}", r"\p{M}", r"\p{Ll}", r"\s"])
def test_the_libraries_have_the_same_classes_of_characters(name):
    """Fails where one is of another Unicode version: then the pattern needs the characters in between."""
    from tiktoken import Encoding

    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x40000))))
    encoding = Encoding(
        "b", pat_str=name, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    theirs = encoding.decode(encoding.encode_ordinary(every))
    others = normalizers.Replace(Regex(f"(?:{name})+"), "").normalize_str(every)
    assert len(theirs) > 20
    assert set(theirs) == set(every) - set(others)
