"""Samples of text files: bounded, fair, and nothing of a text lost."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pytest

from megatron_periln.data.readers.inputs import find_inputs
from megatron_periln.data.tokenizer_training.sampling import read_texts, take_sample

TEXT = "".join(f"line {n} of a text\n" * (n % 3 + 1) for n in range(3000)) + "x" * 40_000 + " end"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst"])
def test_nothing_is_lost(tmp_path: Path, suffix: str) -> None:
    content = (json.dumps({"text": [TEXT, ""]}) if "json" in suffix else TEXT).encode()
    compress = {
        ".gz": gzip.compress,
        ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
    }.get(Path(f"a{suffix}").suffix, bytes)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(content))
    pieces = list(read_texts(find_inputs([str(path)] * 2), ["text"]))
    assert "".join(pieces) == TEXT * 2
    assert max(map(len, pieces)) <= 1 << 14
    assert sum(piece.endswith("\n") for piece in pieces) > len(pieces) // 2


def test_line_ends_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\r\nb\rc\n")
    assert list(read_texts(find_inputs([str(path)]), ["text"])) == ["a\r\nb\rc\n"]


def test_prefix() -> None:
    texts = iter([f"{n:04}" for n in range(1000)])
    sample = take_sample(texts, 400, seed=None)
    assert sorted(sample.train + sample.held_out) == [f"{n:04}".encode() for n in range(100)]
    assert sample.bytes_seen == 400
    assert next(texts) == "0100"


def test_reservoir() -> None:
    """Bounded, in order, and every piece as likely as any other."""
    texts = [f"{n:04}" for n in range(1000)]
    counts = dict.fromkeys(texts, 0)
    for seed in range(200):
        sample = take_sample(texts, 400, seed=seed)
        taken = [piece.decode() for piece in sample.train + sample.held_out]
        assert len(set(taken)) == 100
        assert sample.train == sorted(sample.train)
        assert sample.bytes_seen == 4000
        for piece in taken:
            counts[piece] += 1
    for part in (texts[:100], texts[450:550], texts[-100:]):
        assert 1850 < sum(counts[text] for text in part) < 2150


def test_a_large_piece() -> None:
    assert take_sample(["a" * 50], 10, seed=1).train == [b"a" * 50]
    assert take_sample(["a" * 50], 10, seed=1).held_out == []


def test_pieces_of_many_sizes() -> None:
    """Those with the lowest numbers are taken, however small one with a high number is."""
    sizes = random.Random(0).choices((1, 10, 100, 1000), k=500)
    texts = [f"{n:04}" + "x" * size for n, size in enumerate(sizes)]
    for seed in range(20):
        sample = take_sample(texts, 20_000, seed=seed)
        taken = {int(piece[:4]) for piece in sample.train + sample.held_out}
        draw = random.Random(seed).random
        numbers = [draw() for _ in texts]
        left = [number for n, number in enumerate(numbers) if n not in taken]
        assert max(numbers[n] for n in taken) < min(left)
        assert 18_000 < sum(len(texts[n]) for n in taken) <= 20_000
