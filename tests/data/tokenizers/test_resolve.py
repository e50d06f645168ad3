"""What is kept of a tokenizer, under which key, and that nothing heavy is imported to read it again."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_periln.data.tokenizers import cache as tokenizer_cache
from megatron_periln.data.tokenizers import resolve
from megatron_periln.data.tokenizers.encoders import choose_encoder, token_dtype
from megatron_periln.data.tokenizers.megatron_tokenizer import (
    add_tokenizer_args,
    check_tokenizer_files,
    end_of_document,
)
from megatron_periln.data.tokenizers.probes import probe_texts
from megatron_periln.data.tokenizers.resolve import resolve_tokenizer, wrap_tokenizer
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer
from megatron_periln.errors import PreprocessError

ROOM = resolve.__name__.rpartition(".")[0]
FLAGS = vars(add_tokenizer_args(argparse.ArgumentParser()).parse_args([]))


def parse(flags: list[Any]) -> Namespace:
    return add_tokenizer_args(argparse.ArgumentParser()).parse_args([str(flag) for flag in flags])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "megatron-periln" / "tokenizers"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Namespace]:
    """The flags of each tokenizer that Megatron is asked for."""
    calls: list[Namespace] = []
    original = resolve.build_tokenizer

    def build(args: Namespace) -> Any:
        calls.append(args)
        return original(args)

    monkeypatch.setattr(resolve, "build_tokenizer", build)
    return calls


def test_flags_are_megatrons() -> None:
    from megatron.training.arguments import _add_tokenizer_args

    ours = add_tokenizer_args(argparse.ArgumentParser())._actions
    theirs = _add_tokenizer_args(argparse.ArgumentParser())._actions
    names = ("option_strings", "dest", "default", "type", "nargs", "const", "required")
    for left, right in zip(ours, theirs, strict=True):
        assert [getattr(left, name) for name in names] == [getattr(right, name) for name in names]
        assert list(left.choices or []) == list(right.choices or [])
        assert type(left) is type(right)
        assert left.help


@pytest.mark.parametrize("size", [None, 0, 1, 255, 256, 65499, 65500, 65501, 65536, 128000, 2**31])
def test_token_dtype_is_megatrons(size: int | None) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(size) == DType.optimal_dtype(size)


KINDS = {
    "sentencepiece": "sentencepiece",
    "sentencepiece without eos": "sentencepiece",
    "huggingface": "tokenizers",
    "huggingface without eos": "tokenizers",
    "tiktoken": "tiktoken",
}


@pytest.mark.parametrize("name", KINDS)
def test_facts_are_megatrons(
    name: str, tokenizers: dict[str, list[str]], megatron_tokenizer: Callable[[str], Any], built: list
) -> None:
    first = resolve_tokenizer(parse(tokenizers[name]))
    second = resolve_tokenizer(parse(tokenizers[name]))
    assert len(built) == 1
    theirs = megatron_tokenizer(name)
    for resolved in (first, second):
        assert resolved.kind == KINDS[name]
        assert resolved.vocab_size == theirs.vocab_size
        assert resolved.eod == (None if name.endswith("without eos") else end_of_document(theirs))
        assert tokenizers[name][3] in resolved.description
        assert len(resolved.probes) > 900
        for text, ids in resolved.probes[::50]:
            assert ids == list(theirs.tokenize(text))
    for field in ("digest", "payload", "settings", "accelerated", "probes", "description"):
        assert getattr(first, field) == getattr(second, field), field


def test_digests_differ(tokenizers: dict[str, list[str]]) -> None:
    flags = tokenizers["tiktoken"]
    bpe = tokenizers["huggingface"]
    several = [*map(tokenizers.__getitem__, KINDS), [*flags, "--tiktoken-pattern", "v1"]]
    several.append([*bpe, "--tokenizer-special-tokens", "<extra>"])
    assert len({resolve_tokenizer(parse(each)).digest for each in several}) == len(several)


LIGHT = """
import argparse, sys
from megatron_periln.data.tokenizers.encoders import choose_encoder
from megatron_periln.data.tokenizers.resolve import resolve_tokenizer
from megatron_periln.data.tokenizers.megatron_tokenizer import add_tokenizer_args
args = add_tokenizer_args(argparse.ArgumentParser()).parse_args(sys.argv[1:])
choice = choose_encoder(resolve_tokenizer(args))
print(len(choice.encoder.encode(["a b", "c"])[0]))
heavy = {"torch", "transformers", "megatron", "awkward", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("name", ["huggingface", "sentencepiece", "tiktoken"])
def test_a_known_tokenizer_needs_no_heavy_import(name: str, tokenizers: dict[str, list[str]]) -> None:
    resolve_tokenizer(parse(tokenizers[name]))
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *tokenizers[name]], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", ["payload", "facts.json", "probes.json", "sha256.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "absent"])
def test_a_damaged_entry_is_replaced(
    file: str, damage: str, cache: Path, tokenizers: dict[str, list[str]], built: list
) -> None:
    good = resolve_tokenizer(parse(tokenizers["huggingface"]))
    (entry,) = cache.iterdir()
    path = entry / file
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(content[:-10] if damage == "cut" else content[:-10] + b"0123456789")
    assert resolve_tokenizer(parse(tokenizers["huggingface"])).payload == good.payload
    assert len(built) == 2
    assert path.read_bytes() == content
    resolve_tokenizer(parse(tokenizers["huggingface"]))
    assert len(built) == 2
    assert list(cache.iterdir()) == [entry]


def test_an_entry_of_another_layout_is_built_again(
    cache: Path, tokenizers: dict[str, list[str]], built: list
) -> None:
    args = parse(tokenizers["huggingface"])
    resolve_tokenizer(args)
    (entry,) = cache.iterdir()
    files = tokenizer_cache.read_entry(entry.name)
    assert files
    (entry / "sha256.json").unlink()
    assert tokenizer_cache.write_entry(entry.name, {**files, "facts.json": b'{"kind": "tokenizers"}'})
    assert resolve_tokenizer(args).vocab_size
    assert len(built) == 2


def test_a_changed_file_is_another_tokenizer(tmp_path: Path, tokenizers: dict[str, list[str]]) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tokenizers["huggingface"][3], folder)
    args = parse(["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder])
    keys = [tokenizer_cache.content_key(args, FLAGS)]
    (folder / "model.safetensors").write_bytes(b"weights")
    assert tokenizer_cache.content_key(args, FLAGS) == keys[0]
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        path = folder / name
        path.write_text(path.read_text() + " " if path.exists() else "{}")
        keys.append(tokenizer_cache.content_key(args, FLAGS))
    args.tokenizer_hf_no_include_special_tokens = True
    keys.append(tokenizer_cache.content_key(args, FLAGS))
    args.chat_template = "{{ messages }}"
    assert tokenizer_cache.content_key(args, FLAGS) == keys[-1]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_files_that_cannot_be_known_have_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text("{}")
    fetched = ["--tokenizer-type", "GPT2BPETokenizer", "--merge-file", vocabulary]
    assert tokenizer_cache.content_key(parse(fetched), FLAGS) is None
    assert tokenizer_cache.content_key(parse([*fetched, "--vocab-file", vocabulary]), FLAGS)
    args = parse(["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path])
    assert tokenizer_cache.content_key(args, FLAGS)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_cache, "MAX_BYTES", 1)
        assert tokenizer_cache.content_key(args, FLAGS) is None

    def fail(_: Path) -> bytes:
        raise PermissionError

    own_code = tokenizer_cache.own_code()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) if path in own_code else fail(path))
    assert tokenizer_cache.content_key(args, FLAGS) is None


def test_versions_are_part_of_the_key(
    tokenizers: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import version

    found = tokenizer_cache.versions()
    for name in ("megatron-core", "transformers", "tokenizers", "tiktoken", "sentencepiece"):
        assert found[name] == version(name)
    args = parse(tokenizers["huggingface"])
    key = tokenizer_cache.content_key(args, FLAGS)
    monkeypatch.setattr(tokenizer_cache, "versions", lambda: {**found, "tokenizers": "0"})
    assert tokenizer_cache.content_key(args, FLAGS) != key


def test_our_code_is_part_of_the_key(
    tmp_path: Path, tokenizers: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_code = tokenizer_cache.own_code()
    modules = {Path(str(module.__file__)) for name, module in sys.modules.items() if name.startswith(ROOM)}
    assert {Path(resolve.__file__), Path(tokenizer_cache.__file__)} < modules <= set(own_code)
    args = parse(tokenizers["huggingface"])
    keys = {tokenizer_cache.content_key(args, FLAGS)}
    changed = tmp_path / "changed.py"
    for place, source in enumerate(own_code):
        changed.write_bytes(source.read_bytes() + b"\n")
        sources = [*own_code[:place], changed, *own_code[place + 1 :]]
        monkeypatch.setattr(tokenizer_cache, "own_code", lambda sources=sources: sources)
        keys.add(tokenizer_cache.content_key(args, FLAGS))
    assert len(keys) == len(own_code) + 1


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, tokenizers: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert resolve_tokenizer(parse(tokenizers["tiktoken"])).kind == "tiktoken"


def test_a_name_on_the_hub_is_known_by_its_local_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    args = parse(["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "some/model"])
    assert tokenizer_cache.content_key(args, FLAGS) is None
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    assert tokenizer_cache.content_key(args, FLAGS) is None
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text("{}")
    first = tokenizer_cache.content_key(args, FLAGS)
    (snapshot / "tokenizer.json").write_text("[]")
    assert first != tokenizer_cache.content_key(args, FLAGS)
    assert first is not None


def test_what_only_megatron_can_do_is_left_to_it(cache: Path, tokenizers: dict[str, list[str]]) -> None:
    null = resolve_tokenizer(parse(["--tokenizer-type", "NullTokenizer", "--vocab-size", 100]))
    legacy = [*tokenizers["sentencepiece"], "--tokenizer-sentencepiece-legacy"]
    pieces = resolve_tokenizer(parse([*legacy, "--tokenizer-special-tokens", "<a>"]))
    assert [null.kind, pieces.kind] == ["megatron", "megatron"]
    assert null.eod == 99
    assert null.digest != pieces.digest
    assert not cache.exists()
    assert choose_encoder(null).encoder.encode(["1 2", "3"])[0].tolist() == [1, 2, 3]


def test_what_only_megatron_can_do_is_known_by_its_files_and_settings_alone(
    tmp_path: Path, tokenizers: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit of ours, or another version, made another tokenizer of it: no resuming, no merging."""
    import shutil

    class Letters:
        vocab_size, eod = 300, None
        tokenize = list

    flags = [*tokenizers["sentencepiece"][:2], "--tokenizer-sentencepiece-legacy"]
    (tmp_path / "elsewhere").mkdir()
    model = Path(shutil.copy(tokenizers["sentencepiece"][3], tmp_path / "elsewhere" / "model"))

    def digest(*more: object) -> str:
        return wrap_tokenizer(Letters(), parse([*flags, "--tokenizer-model", *map(str, more)])).digest

    first = digest(tokenizers["sentencepiece"][3])
    monkeypatch.setattr(tokenizer_cache, "versions", lambda: {"tokenizers": "0"})
    monkeypatch.setattr(tokenizer_cache, "own_code", list)
    assert digest(model) == first
    others = {digest(model, "--tokenizer-special-tokens", "<a>"), digest("some/unknown-name")}
    model.write_bytes(model.read_bytes() + b" ")
    assert len({first, *others, digest(model)}) == 4
    settled = parse([*flags, "--tokenizer-model", "some/unknown-name"])
    settled.output_prefix = "a flag that is no tokenizer's"
    assert wrap_tokenizer(Letters(), settled).digest in others


def test_any_object_with_megatrons_methods() -> None:
    class Letters:
        vocab_size = 300
        eod = None

        def tokenize(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

    resolved = wrap_tokenizer(Letters())
    assert (resolved.kind, resolved.eod, resolved.vocab_size) == ("megatron", None, 300)
    choice = choose_encoder(resolved)
    assert (choice.encoder.name, choice.reference) == ("megatron", None)
    ids, lengths = choice.encoder.encode(["ab", "", "c"])
    assert (ids.tolist(), lengths.tolist()) == ([97, 98, 99], [2, 0, 1])


@pytest.mark.parametrize("flags", [[], ["--tokenizer-type", "TikTokenizer"]])
def test_missing_flags(flags: list[str]) -> None:
    with pytest.raises(PreprocessError, match="--tokenizer-"):
        resolve_tokenizer(parse(flags))


def test_missing_file(tmp_path: Path) -> None:
    args = parse(["--tokenizer-type", "TikTokenizer", "--tokenizer-model", tmp_path / "absent"])
    with pytest.raises(PreprocessError, match="no such file"):
        check_tokenizer_files(args)
    with pytest.raises(PreprocessError, match="no such file"):
        resolve_tokenizer(args)


def test_probes_are_text_and_always_the_same() -> None:
    texts = probe_texts(["<s>"], ["ab", "é"])
    assert texts == probe_texts(["<s>"], ["ab", "é"])
    assert "".join(texts).encode()
    assert {"", "<s>", "a<s>b"} <= set(texts)
    assert json.loads(json.dumps(texts)) == texts


def test_a_resolved_tokenizer_without_flags() -> None:
    resolved = ResolvedTokenizer("tokenizers", 1, None, "", "one")
    with pytest.raises(PreprocessError, match="one is not described by flags"):
        resolved.megatron_tokenizer()
