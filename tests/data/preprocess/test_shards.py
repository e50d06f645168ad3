"""Datasets of limited size, and parts of the input: together they are the dataset of one run."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_periln.data.indexed.sidecar import Sidecar
from tests.data.companions import refusal, run_tool
from tests.data.preprocessing import by_megatron, names, read, to_lines

TEXTS = [f"{n}{'x' * (n * 7 % 50)}" if n % 6 else "" for n in range(60)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, stub: Callable) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes long
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 50)
    monkeypatch.setattr("megatron_periln.data.readers.parquet.RANGE_BYTES", 100)
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


def test_inputs_are_listed_once(tmp_path: Path, inputs: list[object], run: Callable) -> None:
    """In the first dataset's sidecar, and there once: else they are datasets times inputs, twice."""
    flags = [*inputs, "--output-prefix", tmp_path / "out", "--tokenizer-type", "NullTokenizer"]
    assert run(*flags, "--max-bin-size", 300)[0] == 0
    paths = sorted(tmp_path.glob("out*.json"))
    assert len(paths) > 5
    first, *others = [path.read_text() for path in paths]
    assert first.count("a.jsonl") == 2  # in the command, too
    assert not any("a.jsonl" in other for other in others)
    prefixes = [path.with_suffix("") for path in paths]
    code, stderr = run(*flags, "--max-bin-size", 300, "--resume")
    assert (code, "Nothing to do" in stderr) == (0, True)
    merge = ("--overwrite", "--output-prefix", tmp_path / "merged", "--inputs")
    assert run_tool("merge_datasets", *merge, *prefixes).code == 0
    assert Sidecar.read(tmp_path / "merged.json").inputs == Sidecar.read(paths[0]).inputs
    assert len(Sidecar.read(paths[0]).inputs) == 9

    whole = Sidecar.read(paths[0])
    replace(whole, plan={**whole.plan, "--append-eod": False}).write(paths[0])
    message = refusal("merge_datasets", tmp_path, *merge, *prefixes)
    assert f"{paths[1]}: its inputs are listed in {paths[0].name}, and there is another run's" in message
    paths[0].unlink()
    message = refusal("merge_datasets", tmp_path, *merge, prefixes[1])
    assert f"{paths[1]}: its inputs are listed in another sidecar: {paths[0]}: cannot be read" in message


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


EMPTY = {
    "no line begins": to_lines(["x" * 300]),
    "documents without text": to_lines(["", "", "", "", "", "", "one"]),
    "bad documents": b"x" * 49 + b"\n" + to_lines(["one"]),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_shards_without_tokens(tmp_path: Path, run: Callable, name: str, compressed: bool) -> None:
    """They are datasets that can be merged, and the same command finds them finished."""
    source = tmp_path / ("in.jsonl.gz" if compressed else "in.jsonl")
    source.write_bytes(gzip.compress(EMPTY[name]) if compressed else EMPTY[name])
    flags = ["--input", source, "--on-error", "skip", "--tokenizer-type", "NullTokenizer"]
    assert run(*flags, "--output-prefix", tmp_path / "single")[0] == 0
    prefixes = []
    for shard in range(3):
        parts = ["--output-prefix", tmp_path / f"out_{shard}", "--shard", f"{shard}/3", "--resume"]
        for expected in ("Wrote ", "Nothing to do"):
            code, stderr = run(*flags, *parts)
            assert code == 0, stderr
            assert expected in stderr
        prefixes.append(tmp_path / f"out_{shard}_text_document")
    assert 0 in [Path(f"{prefix}.bin").stat().st_size for prefix in prefixes]
    assert run_tool("merge_datasets", "--inputs", *prefixes, "--output-prefix", tmp_path / "merged").code == 0
    assert read(tmp_path / "merged") == read(tmp_path / "single_text_document")
    single, merged = (Sidecar.read(tmp_path / name) for name in ("single_text_document.json", "merged.json"))
    assert merged.inputs == single.inputs
    assert (merged.bytes_read, merged.skipped) == (single.bytes_read, single.skipped)


def test_only_empty_shards(tmp_path: Path, run: Callable) -> None:
    """Their merge is refused, as a single run is."""
    (tmp_path / "in.jsonl").write_bytes(to_lines([""] * 9))
    prefixes = [tmp_path / f"out_{shard}" for shard in range(2)]
    for shard, prefix in enumerate(prefixes):
        flags = ["--output-prefix", prefix, "--shard", f"{shard}/2"]
        assert run("--input", tmp_path / "in.jsonl", *flags)[0] == 0
    datasets = [f"{prefix}_text_document" for prefix in prefixes]
    message = refusal(
        "merge_datasets", tmp_path, "--inputs", *datasets, "--output-prefix", tmp_path / "merged"
    )
    assert f"{tmp_path}/merged: no dataset to be merged has tokens" in message


@pytest.mark.parametrize("shard", ["2/2", "-1/2", "1", "a/b", "0/0"])
def test_no_shard(tool: Callable, capsys: pytest.CaptureFixture[str], shard: str) -> None:
    parser = tool.build_parser()  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        parser.parse_args(["--input", "a", "--output-prefix", "b", f"--shard={shard}"])
    assert f"{shard} is not I/N with 0 <= I < N, such as 0/8" in capsys.readouterr().err
