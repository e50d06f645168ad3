"""Datasets of limited size, and parts of the input: together they are the dataset of one run."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_periln.data import tables
from tests.data.preprocessing import by_megatron, names, read, to_lines

TEXTS = [f"{n}{'x' * (n * 7 % 50)}" if n % 6 else "" for n in range(60)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, stub: Callable) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes long
    monkeypatch.setattr("megatron_periln.data.plan._CHUNK_BYTES", 50)
    monkeypatch.setattr(tables, "_RANGE_BYTES", 100)
    stub(lambda text: None)


@pytest.fixture
def inputs(tmp_path: Path) -> list[object]:
    """Files of several forms."""
    (tmp_path / "a.jsonl").write_bytes(to_lines(TEXTS[:30]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(to_lines(TEXTS[30:35])))
    parquet.write_table(pa.table({"text": TEXTS[35:50]}), tmp_path / "c.parquet", row_group_size=10)
    (tmp_path / "d").mkdir()
    for n, text in enumerate(TEXTS[50:55]):
        (tmp_path / "d" / f"{n}.txt").write_text(text)
    (tmp_path / "e.jsonl").write_bytes(to_lines(TEXTS[55:]))
    return ["--input", *sorted(tmp_path.iterdir()), "--append-eod", "--workers", 2]


def merged(prefixes: list[Path], to: Path) -> tuple[bytes, bytes]:
    """Return what Megatron's builder makes of several datasets."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{to}.bin", dtype=DType.optimal_dtype(256))
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(f"{to}.idx")
    return read(to)


@pytest.mark.parametrize("limit", [300, 1000, 1 << 30])
def test_size_limit(tmp_path: Path, inputs: list[object], run: Callable, limit: int) -> None:
    code, stderr = run(*inputs, "--output-prefix", tmp_path / "out", "--max-bin-size", limit)
    assert code == 0, stderr
    count = len(list(tmp_path.glob("out*.bin")))
    prefixes = [tmp_path / f"out_text_document_{n:05d}" for n in range(count)]
    assert names(tmp_path) == [
        f"{prefix.name}.{suffix}" for prefix in prefixes for suffix in ("bin", "idx", "json")
    ]
    sizes = [Path(f"{prefix}.bin").stat().st_size for prefix in prefixes]
    assert (count > 1) == (sum(sizes) > limit)
    assert max(sizes) <= max(limit, 2 * 51 * 5)  # a chunk alone may exceed it
    if limit == 300:
        assert sum(size <= limit for size in sizes) > 5
    expected = by_megatron(tmp_path / "reference", TEXTS, eod=True)
    assert merged(prefixes, tmp_path / "merged") == expected
    sidecars = [json.loads(Path(f"{prefix}.json").read_text()) for prefix in prefixes]
    assert sum(sidecar["documents"] for sidecar in sidecars) == len(TEXTS)
    assert all(sidecar["tokens"] * 2 == size for sidecar, size in zip(sidecars, sizes, strict=True))


def test_size_limit_of_several_keys(tmp_path: Path, run: Callable) -> None:
    """Each key goes on in another dataset when its own is full."""
    documents = [{"long": "x" * 40, "short": "y"}] * 10
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    flags = ["--json-keys", "long", "short", "--max-bin-size", 200, "--output-prefix", tmp_path / "out"]
    code, stderr = run("--input", tmp_path / "in.jsonl", *flags)
    assert code == 0, stderr
    assert [path.stat().st_size for path in sorted(tmp_path.glob("out_long*.bin"))] == [160] * 5
    assert [path.stat().st_size for path in sorted(tmp_path.glob("out_short*.bin"))] == [20]


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5])
def test_shards(tmp_path: Path, inputs: list[object], run: Callable, shards: int) -> None:
    prefixes = []
    for shard in range(shards):
        flags = ["--output-prefix", tmp_path / f"out_{shard}", "--shard", f"{shard}/{shards}"]
        code, stderr = run(*inputs, *flags)
        assert code == 0, stderr
        prefixes.append(tmp_path / f"out_{shard}_text_document")
    sizes = [Path(f"{prefix}.bin").stat().st_size for prefix in prefixes]
    assert max(sizes) < 3 * min(sizes)
    expected = by_megatron(tmp_path / "reference", TEXTS, eod=True)
    assert merged(prefixes, tmp_path / "merged") == expected


def test_empty_shard(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(to_lines(TEXTS)))
    flags = ["--input", tmp_path / "in.jsonl.gz", "--output-prefix", tmp_path / "out"]
    assert "--shard 0/2 has no input: use fewer shards" in refused(*flags, "--shard", "0/2")
    assert names(tmp_path) == []


@pytest.mark.parametrize("shard", ["2/2", "-1/2", "1", "a/b", "0/0"])
def test_no_shard(tool: Callable, capsys: pytest.CaptureFixture[str], shard: str) -> None:
    parser = tool.build_parser()  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        parser.parse_args(["--input", "a", "--output-prefix", "b", f"--shard={shard}"])
    assert f"{shard} is not I/N with 0 <= I < N, such as 0/8" in capsys.readouterr().err
