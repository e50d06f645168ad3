"""Megatron's tokenizers that files describe: where they come from, with and without the change."""

import functools
import json
from argparse import ArgumentParser
from unittest import mock

import pytest

from tests.cpu import fresh
from tests.data.vocabularies import TEXT, byte_level_files, reference_ids
from tests.patches.applied import with_fixes, without_fixes


def ids(flags, cache):
    """Return what Megatron makes of the text with a cache of the hub, and without a network."""
    from megatron.core.tokenizers.text.libraries import huggingface_tokenizer
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import _add_tokenizer_args

    auto = huggingface_tokenizer.AutoTokenizer
    offline = functools.partial(auto.from_pretrained, cache_dir=cache, local_files_only=True)
    args = _add_tokenizer_args(ArgumentParser()).parse_args(flags)
    args.pad_vocab_size = False
    with mock.patch.object(auto, "from_pretrained", offline):
        return list(build_tokenizer(args).tokenize(TEXT))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The flags of a tokenizer, and the files they name."""
    vocabulary, merges = byte_level_files(tmp_path_factory.mktemp("files"), size=400)
    kind = ["--tokenizer-type", "GPT2BPETokenizer"]
    return [*kind, "--vocab-file", str(vocabulary), "--merge-file", str(merges)], vocabulary, merges


@pytest.fixture
def hub(tmp_path):
    """A cache of the hub that has another ``gpt2``, and its files."""
    repository = tmp_path / "models--gpt2"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    vocabulary, merges = byte_level_files(snapshot, size=300, tokenizer_json=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return tmp_path, vocabulary, merges


def test_upstream_still_asks_the_hub_whatever_files_there_are(files, tmp_path):
    with pytest.raises(fresh.CallError, match="AutoTokenizer for gpt2"):
        without_fixes(ids, files[0], tmp_path)


def test_upstream_still_ignores_the_files_where_the_hub_answers(files, hub):
    flags, *given = files
    cache, *cached = hub
    assert without_fixes(ids, flags, cache) == reference_ids(*cached) != reference_ids(*given)


def test_the_files_are_read(files, hub, tmp_path_factory):
    """With the hub's tokenizer at hand, and without."""
    flags, *given = files
    for cache in (hub[0], tmp_path_factory.mktemp("empty")):
        assert with_fixes(["read_vocabulary_files"], ids, flags, cache) == reference_ids(*given)
