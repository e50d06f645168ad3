"""``train_tokenizer.py``: what it writes loads in Megatron and transformers and gives text back."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_periln.data.readers.inputs import find_inputs
from megatron_periln.data.tokenizer_training.sampling import read_texts, take_sample
from megatron_periln.data.tokenizers.megatron_tokenizer import add_tokenizer_args, build_tokenizer
from tests.data.companions import (
    TOOLS,
    WITHOUT_MEGATRON,
    Result,
    snapshot,
)
from tests.data.training_runs import KINDS, Training

TOOL = TOOLS / "train_tokenizer.py"
ODD = [
    "  leading, trailing  \n\n\tand\r\ntabs \n",
    "naïve — 漢字 🙂 e\u0301 \u200f\u05e9\u05dc\u200b \x7f",
    "def f(x):\n    return x ** 2  # 1234567 isn't 3.14\n",
    " ",
    "\n",
]


@pytest.fixture
def training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Training:
    return Training(tmp_path, capfd)


@pytest.fixture
def run(training: Training) -> Callable[..., Result]:
    return training.run


@pytest.fixture
def refused(training: Training) -> Callable[..., str]:
    return training.refusal


def megatrons(*flags: object) -> Any:
    return build_tokenizer(add_tokenizer_args(argparse.ArgumentParser()).parse_args(list(map(str, flags))))


@pytest.mark.parametrize("kind", KINDS)
def test_megatron_loads_it(run: Callable, tmp_path: Path, training: Training, kind: str) -> None:
    """With the flags that the tool prints; text comes back to the byte; eod and padding have ids."""
    code, stdout, stderr = run(kind, "--special-tokens", "<|im_start|>", "<|im_end|>")
    assert code == 0, stderr
    flags = stdout.splitlines()[-1].split()
    assert flags[1::2] == [KINDS[kind][1], str(tmp_path / "out")]
    tokenizer = megatrons(*flags)
    sentencepiece = kind in ("bpe", "unigram")
    assert tokenizer.vocab_size == 600
    assert tokenizer.eod == (2 if sentencepiece else 0)
    assert tokenizer.pad == (3 if sentencepiece else 1)
    assert f"600 ids; end-of-document token {tokenizer.eod}" in stdout
    texts = [json.loads(line)["text"] for line in training.corpus.read_text().splitlines()[::10]]
    for text in [*texts, *ODD]:
        ids = tokenizer.tokenize(text)
        assert all(0 <= token < 600 for token in ids)
        assert tokenizer.eod not in ids
        assert tokenizer.detokenize(ids) == text
    ids = tokenizer.tokenize("a<|im_start|>b<|im_end|>")
    first = 4 if sentencepiece else 2
    assert [token for token in ids if token in (first, first + 1)] == [first, first + 1]
    assert sum(map(len, texts)) > 1.8 * sum(len(tokenizer.tokenize(text)) for text in texts)


@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
def test_transformers_loads_it(run: Callable, tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    assert run(kind, "--eos-token", "<end>", "--special-tokens", "<a>")[0] == 0
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["clean_up_tokenization_spaces"] is False  # which transformers 4 would do
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.eos_token_id) == (600, "<end>", 0)
    assert (tokenizer.pad_token_id, tokenizer.bos_token, tokenizer.unk_token) == (1, None, None)
    assert {"<end>", "<|pad|>", "<a>"} == set(tokenizer.all_special_tokens)
    for text in ODD:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer("x<a>y<end>").input_ids, skip_special_tokens=True) == "xy"
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert [again(text).input_ids for text in ODD] == [tokenizer(text).input_ids for text in ODD]


def test_splits(run: Callable, tmp_path: Path) -> None:
    """No token of ``llama3`` has more than three digits; GPT-2's split keeps digits and newlines apart."""
    pre = {}
    for kind in ("llama3", "gpt2"):
        from tokenizers import Tokenizer

        run(kind, "--overwrite")
        pre[kind] = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).pre_tokenizer
    text = "It's 12345 (DON'T)  go\n\n  on"
    words = {kind: [text[start:end] for _, (start, end) in pre[kind].pre_tokenize_str(text)] for kind in pre}
    assert words["llama3"] == [
        *("It", "'s", " ", "123", "45", " (", "DON", "'T", ")", " ", " go", "\n\n", " ", " on")
    ]
    assert words["gpt2"] == ["It", "'s", " 12345", " (", "DON", "'", "T", ")", " ", " go", "\n\n ", " on"]


def test_the_tool_that_preprocesses_takes_it(run: Callable, tmp_path: Path, training: Training) -> None:
    """As tools/preprocess_data.py uses a tokenizer: ids within the dtype, documents ended by eod."""
    from megatron.core.datasets.indexed_dataset import DType

    run("llama3")
    tokenizer = megatrons(*KINDS["llama3"], "--tokenizer-model", tmp_path / "out")
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    assert dtype is np.uint16
    texts = [json.loads(line)["text"] for line in training.corpus.read_text().splitlines()[:5]]
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=dtype)
    for text in texts:
        ids = [*tokenizer.tokenize(text), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "d.idx"))
    read = IndexedDataset(str(tmp_path / "d"))
    assert [tokenizer.detokenize(ids[:-1].tolist()) for ids in read[:]] == texts
    assert {int(ids[-1]) for ids in read[:]} == {tokenizer.eod}


@pytest.mark.parametrize("kind", ["bpe", "llama3"])
def test_the_seed_decides(run: Callable, training: Training, kind: str) -> None:
    written = []
    for seed in (1, 1, 2):
        code, _, stderr = run(kind, "--sample-bytes", "60K", "--seed", seed, "--overwrite")
        assert code == 0, stderr
        written.append(snapshot(training.out.parent))
    assert written[0] == written[1] != written[2]


def test_held_out_is_not_trained_on(run: Callable, tmp_path: Path, training: Training) -> None:
    """Its bytes a token are those of Megatron's tokenizer on every 50th piece."""
    _, stdout, stderr = run("gpt2", "--json-keys", "title", "--vocab-size", 300)
    pieces = list(read_texts(find_inputs([str(training.corpus)]), ["title"]))
    sample = take_sample(pieces, 10**9, seed=1)
    assert sample.held_out == [piece.encode() for piece in pieces[::50]]
    assert f"Training on {sum(map(len, sample.train)):,} bytes of the {sample.bytes_seen:,} read" in stderr
    tokenizer = megatrons(*KINDS["llama3"], "--tokenizer-model", tmp_path / "out")
    size = sum(map(len, sample.held_out))
    tokens = sum(len(tokenizer.tokenize(piece.decode())) for piece in sample.held_out)
    assert f"On held-out text: {size / tokens:.3f} bytes a token ({size:,} bytes" in stdout


def test_the_tool_starts_without_transformers(tmp_path: Path, training: Training) -> None:
    flags = [*KINDS["gpt2"], "--input", training.corpus, "--vocab-size", "300", "--output", tmp_path / "out"]
    subprocess.run([sys.executable, "-c", WITHOUT_MEGATRON, str(TOOL), *map(str, flags)], check=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("tokenizer.json", "tokenizer_config.json")
    ]
