"""An export has a tokenizer that gives the ids of training, whatever the target; or it has none."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from sentencepiece import SentencePieceProcessor

from megatron_periln.convert.model_folder import SpecialTokens
from megatron_periln.convert.targets import TARGETS
from megatron_periln.convert.tokens import auto_tokenizer
from megatron_periln.convert.tokens import texts as compared
from megatron_periln.convert.tokens import write as writing
from megatron_periln.convert.tokens.auto_tokenizer import Loaded, UnreadableError, load, read
from megatron_periln.convert.tokens.texts import data_prefixes, repeated_texts, texts_for
from megatron_periln.convert.tokens.tokenizer_files import candidates
from megatron_periln.convert.tokens.training_tokenizer import find_tokenizer
from megatron_periln.convert.tokens.write import prepare_tokenizer
from megatron_periln.errors import UsageError
from tests.convert.test_transformers_4 import VARIABLE
from tests.convert.tokens.kinds import (
    END,
    KINDS,
    LINES,
    QUICKSTART,
    hugging_face,
    parse,
    pieces,
    sentencepiece_model,
    tiktoken,
    with_kind,
)

SIZE, LONGEST = 4096, 256
CLASSES = ("class copied", "class mended")


def load_here(folders, texts):
    """Do in this process what `load` does in a fresh one, in a tenth of the time."""
    try:
        return [Loaded(**read(folder, texts)) for folder in folders]
    except Exception as error:
        raise UnreadableError(str(error)) from error


@pytest.fixture(autouse=True, scope="module")
def fast():
    """Few texts, and no other process; test_model_folder.py has exports with all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compared, "_MIXTURES", 400)
        patch.setattr(writing, "load", load_here)
        yield


def model_folder(path, target="glm4"):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": target}))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: find_tokenizer(make(folder / name), None) for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def of_llama(tmp_path_factory):
    """A tokenizer of the class LlamaTokenizer, which puts a token in front of texts, or does not."""
    return find_tokenizer(hugging_face(tmp_path_factory.mktemp("class") / "of", "LlamaTokenizer"), None)


@pytest.fixture(scope="module")
def written(sources, of_llama, tmp_path_factory):
    """The folders of all targets with the tokenizers of all kinds; and those that should not be."""
    base = tmp_path_factory.mktemp("models")
    folders = {}
    for name, source in sources.items():
        for target in TARGETS:
            folders[name, target] = model_folder(base / name / target, target)
            candidates(source, LONGEST)[-1].write(folders[name, target])
    for target in ("glm4", "llama"):
        folders["copied", target] = model_folder(base / "copied" / target, target)
        candidates(sources["HuggingFaceTokenizer"], LONGEST)[0].write(folders["copied", target])
    for name, way in zip(CLASSES, candidates(of_llama, LONGEST), strict=True):
        folders[name, "llama"] = model_folder(base / name)
        way.write(folders[name, "llama"])
    folder = folders["LlamaTokenizer", "llama"] = model_folder(base / "LlamaTokenizer", "llama")
    (folder / "tokenizer.model").write_bytes(sources["SentencePieceTokenizer"].training.parts.payload)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return folders


@pytest.fixture(scope="module")
def texts(sources):
    return sorted({text for source in sources.values() for text in texts_for(source.training, []).every[::7]})


@pytest.fixture(scope="module")
def expected(sources, texts):
    """The ids of training."""
    return {name: source.training.encode(texts) for name, source in sources.items()}


@pytest.fixture(scope="module")
def loaded(written, texts):
    """What a fresh process makes of the folders, one that is not forked, for once."""
    with mock.patch.object(auto_tokenizer, "subprocess", subprocess):
        return dict(zip(written, load(list(written.values()), texts), strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_training(loaded, expected, sources, texts, name, target):
    assert len(texts) > 1000
    assert loaded[name, target].ids == expected[name]
    assert loaded[name, target].eos == sources[name].training.special_tokens.eos is not None


def test_copied_files_give_other_ids_beside_another_configuration(loaded, expected):
    """The negative control: GPT2Tokenizer splits digits by GPT-2's rule, unless the target is glm4."""
    assert loaded["copied", "llama"].ids == expected["HuggingFaceTokenizer"]
    assert loaded["copied", "glm4"].ids != expected["HuggingFaceTokenizer"]


def test_transformers_own_reading_of_a_sentencepiece_model_differs(loaded, expected):
    """The negative control: the class that reads tokenizer.model, which stood alone in exports."""
    pairs = zip(loaded["LlamaTokenizer", "llama"].ids, expected["SentencePieceTokenizer"], strict=True)
    assert sum(left != right for left, right in pairs) > 100


@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no Python with transformers 4")
def test_transformers_4_gives_the_same(written, texts, expected, of_llama, loaded):
    folders = {key: folder for key, folder in written.items() if key[0] in {*KINDS, *CLASSES}}
    found = dict(zip(folders, load(list(folders.values()), texts, os.environ[VARIABLE]), strict=True))
    copied, mended = (found.pop((name, "llama")).ids for name in CLASSES)
    for (name, target), tokenizer in found.items():
        assert tokenizer.ids == expected[name], (name, target)
    assert mended == of_llama.training.encode(texts)
    # The negative control: transformers 5 finds no fault with the copy.
    assert copied != mended == loaded["class copied", "llama"].ids


def write(flags, folder, given=None, prefixes=()):
    exported = prepare_tokenizer(flags, given)
    return exported.write(folder, SIZE, LONGEST, list(prefixes)), exported.tokens


def test_what_differs_is_mended_and_said(tmp_path):
    line, tokens = write(hugging_face(tmp_path / "tokenizer"), model_folder(tmp_path / "model"))
    assert tokens == SpecialTokens(bos=0, eos=0)
    for part in (
        f"tokenizer.json of HuggingFaceTokenizer {tmp_path / 'tokenizer'}, as PreTrainedTokenizerFast",
        f", because tokenizer files of {tmp_path / 'tokenizer'}: for '1234567890' at token ",
        "; ids equal on ",
        " 900 tokens' own text; end-of-document token 0 <|endoftext|>",
    ):
        assert part in line


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "TokenizersBackend", None])
def test_a_class_that_versions_of_transformers_read_otherwise_is_mended(tmp_path, kind):
    line, _ = write(hugging_face(tmp_path / "tokenizer", kind), model_folder(tmp_path / "model"))
    named = f"the class {kind}" if kind else "files that name no class"
    assert f"as PreTrainedTokenizerFast, because tokenizer files of {tmp_path / 'tokenizer'}: " in line
    assert f": versions of transformers differ on {named}; ids equal on " in line


def test_files_that_give_the_ids_are_copied(tmp_path):
    flags = hugging_face(tmp_path / "tokenizer", "PreTrainedTokenizerFast", model_max_length=77)
    folder = model_folder(tmp_path / "model")
    line, _ = write(flags, folder)
    assert line.startswith(f"tokenizer files of {tmp_path / 'tokenizer'}; ids equal on ")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "tokenizer" / name).read_bytes()


def test_files_that_a_class_alone_has_are_copied(tmp_path, monkeypatch):
    """GPT-SW3's ``spiece.model``, which its class reads in Python."""
    monkeypatch.setattr(compared, "probe_texts", lambda *_: LINES[:20])  # Python takes its time
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(sentencepiece_model(**QUICKSTART, vocab_size=340))
    settings = {"tokenizer_class": "GPTSw3Tokenizer", "eos_token": "</s>", "bos_token": "<s>"}
    settings |= {"unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    flags = parse("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder)
    line, _ = write(flags, model_folder(tmp_path / "model", "llama"))
    assert line.startswith(f"tokenizer files of {folder}; ids equal on ")
    assert (tmp_path / "model/spiece.model").is_file()


def test_special_tokens_that_data_were_made_without_are_left_out(tmp_path):
    from tokenizers import Tokenizer, processors

    flags = hugging_face(tmp_path / "tokenizer", "PreTrainedTokenizerFast")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    tokenizer.save(str(path))
    folder = model_folder(tmp_path / "model")
    line, _ = write(flags, folder)
    assert line.startswith("tokenizer files of ")
    flags.tokenizer_hf_no_include_special_tokens = True
    line, _ = write(flags, folder)
    assert line.startswith("tokenizer.json of ")
    (found,) = load_here([folder], ["a"])
    assert 0 not in found.ids[0]


def test_a_sentencepiece_export_says_its_tokens(tmp_path):
    flags = pieces(tmp_path / "tokenizer")
    folder = model_folder(tmp_path / "model")
    line, tokens = write(flags, folder)
    assert tokens == SpecialTokens(bos=1, eos=2)
    assert line.endswith("; end-of-document token 2 </s>")
    assert (folder / "tokenizer.model").read_bytes() == Path(flags.tokenizer_model).read_bytes()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is settings["add_eos_token"] is False
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == ("<s>", "</s>", None)
    assert settings["model_max_length"] == LONGEST


def test_files_of_a_vocabulary_become_one(tmp_path):
    flags = KINDS["GPT2BPETokenizer"](tmp_path / "files")
    flags.special_tokens = ["<a>"]
    folder = model_folder(tmp_path / "model")
    line, tokens = write(flags, folder)
    assert line.startswith(f"tokenizer.json of GPT2BPETokenizer {flags.vocab_file}, as PreTrained")
    (found,) = load_here([folder], [f"{END}<a>"])
    assert found.ids == [[tokens.eos, 500]] == [[found.eos, 500]]
    (tmp_path / "files" / "vocab.json").unlink()
    line = prepare_tokenizer(flags, None).write(folder, SIZE, LONGEST, [])
    assert line == f"no tokenizer files: {flags.vocab_file} is no file here; --tokenizer PATH adds them"


def sentencepiece_flags(path, model):
    path.write_bytes(model)
    return parse("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", path)


REFUSED = {
    "a unigram model with several equal ways": (
        lambda: sentencepiece_model(model_type="unigram", max_sentencepiece_length=2),
        "32 bits",
    ),
    "an unused piece": (lambda: with_kind(sentencepiece_model(), "▁t", 5), "pieces that are UNUSED"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rules_that_differ_are_refused_with_the_first_text(tmp_path, name):
    model, rule = REFUSED[name]
    flags = sentencepiece_flags(tmp_path / "tokenizer.model", model())
    with pytest.raises(UsageError, match=rf"for '.*'\S* at token \d+ it gives \[.*\], training \[.*{rule}"):
        write(flags, model_folder(tmp_path / "model"))


def test_a_rule_without_an_expression_is_refused(tmp_path):
    model = sentencepiece_model(treat_whitespace_as_suffix=True)
    flags = sentencepiece_flags(tmp_path / "tokenizer.model", model)
    with pytest.raises(UsageError, match=r"treat_whitespace_as_suffix: .*; --no-tokenizer exports the model"):
        write(flags, model_folder(tmp_path / "model"))


def test_what_megatron_does_around_sentencepiece_is_refused_by_its_flag(tmp_path):
    flags = pieces(tmp_path / "tokenizer", remove_extra_whitespaces=True)
    flags.tokenizer_sentencepiece_legacy = True
    line, _ = write(flags, model_folder(tmp_path / "model"))  # which alone changes nothing
    assert "; ids equal on " in line
    for name, value in (
        ("special_tokens", ["<tool>"]),
        ("tokenizer_sentencepiece_ignore_extra_whitespaces", False),
    ):
        setattr(flags, name, value)
        flag = name.removeprefix("tokenizer_").replace("_", "-")
        with pytest.raises(UsageError, match=rf"in a tokenizer.json: --\S*{flag}.*: Megatron itself"):
            write(flags, model_folder(tmp_path / name))


def test_ids_that_are_drawn_at_random_are_refused(tmp_path):
    flags = hugging_face(tmp_path / "tokenizer", "PreTrainedTokenizerFast")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.1
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"its BPE has dropout, so that .*; --no-tokenizer exports"):
        write(flags, model_folder(tmp_path / "model"))


def test_another_tokenizer_is_refused(tmp_path):
    flags = pieces(tmp_path / "trained")
    hugging_face(tmp_path / "other", "PreTrainedTokenizerFast")
    with pytest.raises(UsageError, match=r"no tokenizer files give the ids of training's Sentence.*for '"):
        write(flags, model_folder(tmp_path / "model"), given=tmp_path / "other")
    pieces(tmp_path / "other pieces", vocab_size=500)
    with pytest.raises(UsageError, match=r"tokenizer.model is another than the checkpoint's, .*trained"):
        prepare_tokenizer(flags, tmp_path / "other pieces" / "tokenizer.model")


def test_a_tokenizer_that_moved_is_given(tmp_path):
    for make, file in ((pieces, "tokenizer.model"), (tiktoken, "tiktoken.json")):
        flags = make(tmp_path / "before")
        (tmp_path / "before").rename(tmp_path / "after")
        gone = prepare_tokenizer(flags, None)
        assert gone.write(tmp_path, SIZE, LONGEST, []) == (
            f"no tokenizer files: {tmp_path / 'before' / file} is no file here; --tokenizer PATH adds them"
        )
        given = prepare_tokenizer(flags, tmp_path / "after" / file)
        assert given.source is not None and given.tokens.eos == 2
        shutil.rmtree(tmp_path / "after")


def test_what_is_no_tokenizer(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.model").write_text("nothing")
    for given, message in (
        ("nowhere", "no such folder, nor a file"),
        ("empty", "holds no tokenizer.json; give a tokenizer's folder"),
        ("file.model", "SentencePieceTokenizer cannot be built"),
    ):
        with pytest.raises(UsageError, match=message):
            prepare_tokenizer(parse("--tokenizer-type", "NullTokenizer"), tmp_path / given)
    folder = model_folder(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UnreadableError):
        load([folder], ["a"])


def test_ids_may_have_gaps(tmp_path):
    flags = hugging_face(tmp_path / "tokenizer", "PreTrainedTokenizerFast")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 5000
    path.write_text(json.dumps(content))
    training = find_tokenizer(flags, None).training
    assert (training.size, training.built.vocab_size, len(training.token_texts())) == (5001, 900, 900)
    with pytest.raises(
        UsageError, match=r"the tokenizer has ids up to 5,000, and the model's vocabulary 4,096"
    ):
        write(flags, model_folder(tmp_path / "model"))


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
    exported = prepare_tokenizer(pieces(tmp_path / "tokenizer"), None)
    with pytest.raises(UsageError, match=r"the tokenizer has ids up to \d+, and the model's vocabulary 100;"):
        exported.write(tmp_path, 100, LONGEST, [])


def test_without_files_the_special_tokens_are_named_all_the_same(tmp_path):
    exported = prepare_tokenizer(pieces(tmp_path / "tokenizer"), None, wanted=False)
    assert exported.tokens == SpecialTokens(bos=1, eos=2)
    assert exported.write(tmp_path, SIZE, LONGEST, []) == "no tokenizer files: --no-tokenizer"
    null = parse("--tokenizer-type", "NullTokenizer", "--vocab-size", 100, "--null-tokenizer-eod-id", 7)
    exported = prepare_tokenizer(null, None)
    assert exported.tokens == SpecialTokens(eos=7)
    assert "was trained with NullTokenizer" in exported.write(tmp_path, SIZE, LONGEST, [])


def write_data(prefix, documents):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_documents_of_the_data_are_compared(tmp_path):
    source = find_tokenizer(pieces(tmp_path / "tokenizer"), None)
    documents = ["def f(x):\n    return x\n", "  two\nlines  "]
    prefix = write_data(tmp_path / "data", source.training.encode(documents))
    found = texts_for(source.training, [prefix])
    assert found.documents == 2
    assert found.texts[-2:] == documents
    (tmp_path / "damaged.idx").write_bytes(b"nothing")
    damaged = str(tmp_path / "damaged")
    assert data_prefixes(None, ["0.3", prefix, "0.7", "nowhere", damaged]) == [prefix]
    assert data_prefixes([prefix], ["nowhere"]) == [prefix]
    assert data_prefixes(None, None) == []
    with pytest.raises(UsageError, match=r"--data-path nowhere: there is no nowhere\.idx"):
        data_prefixes(["nowhere"], [prefix])


def test_data_of_another_tokenizer_are_noticed(tmp_path):
    """As where a file was trained anew at the path that the checkpoint names."""
    source = find_tokenizer(pieces(tmp_path / "tokenizer"), None)
    texts = [line * 5 for line in LINES if len(line) > 30][:20]
    texts_for(source.training, [write_data(tmp_path / "its own", source.training.encode(texts))])
    other = SentencePieceProcessor(model_proto=sentencepiece_model([text[::-1] for text in LINES]))
    prefix = write_data(tmp_path / "another's", other.encode(texts))
    with pytest.raises(
        UsageError, match=r"are not from SentencePieceTokenizer .*: it gives the ids of \d of"
    ):
        texts_for(source.training, [prefix])


def test_texts_have_every_feature_and_every_token(sources):
    for source in sources.values():
        found = texts_for(source.training, [])
        for texts in compared.FEATURES.values():
            assert set(texts) <= set(found.texts)
        assert any(f"a{token}b" in found.texts for token in source.training.parts.special_tokens)
        assert len(found.tokens) == source.training.built.vocab_size
    assert "" in found.texts


def test_only_unigram_models_split_repetitions_in_several_ways():
    from megatron_periln.convert.tokens.sentencepiece_model import SentencePieceModel

    assert repeated_texts(SentencePieceModel.read(sentencepiece_model(**QUICKSTART))) == []
    unigram = sentencepiece_model(model_type="unigram", max_sentencepiece_length=2)
    assert any(text.endswith(".....") for text in repeated_texts(SentencePieceModel.read(unigram)))
