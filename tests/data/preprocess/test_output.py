"""Every form of input gives Megatron's bytes, and what is written can be trained on."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_periln.data.preprocess.progress import Progress
from megatron_periln.data.tokenizers.megatron_tokenizer import add_tokenizer_args
from megatron_periln.data.tokenizers.resolve import resolve_tokenizer
from tests.data.compressions import COMPRESS
from tests.data.preprocessing import FILES, TEXTS, by_megatron, names, read, to_lines

zstd = zstandard.ZstdCompressor().compress


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, stub: Callable) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes long
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 100)
    monkeypatch.setattr("megatron_periln.data.readers.parquet.RANGE_BYTES", 10)
    stub(lambda text: None)


def write_table(path: Path, texts: list[str]) -> None:
    parquet.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=4)


def write_texts(folder: Path, texts: list[str]) -> None:
    (folder / "below").mkdir()
    for n, text in enumerate(texts):
        compress, suffix = (gzip.compress, ".gz") if n % 2 else (bytes, "")
        folder_of_text = folder / "below" if n > 5 else folder
        (folder_of_text / f"{'z' * (n > 5)}{n}.txt{suffix}").write_bytes(compress(text.encode()))


FORMS: dict[str, Callable[[Path], Any]] = {
    "in.jsonl": lambda folder: (folder / "in.jsonl").write_bytes(to_lines(TEXTS)),
    "in.jsonl.gz": lambda folder: (folder / "in.jsonl.gz").write_bytes(gzip.compress(to_lines(TEXTS))),
    "in.jsonl.zst": lambda folder: (folder / "in.jsonl.zst").write_bytes(
        zstd(to_lines(TEXTS[:4])) + zstd(to_lines(TEXTS[4:]))
    ),
    "misnamed.gz": lambda folder: (folder / "misnamed.gz").write_bytes(COMPRESS[".xz"](to_lines(TEXTS))),
    "in.parquet": lambda folder: write_table(folder / "in.parquet", TEXTS),
    "**/*.txt*": lambda folder: write_texts(folder, TEXTS),
    ".": lambda folder: write_texts(folder, TEXTS),
}


def write_mixed(folder: Path) -> list[str]:
    """Write the documents to files of several forms; return their names, in order."""
    (folder / "z.jsonl").write_bytes(to_lines(TEXTS[:2]))
    (folder / "y.jsonl.gz").write_bytes(gzip.compress(to_lines(TEXTS[2:4])))
    write_table(folder / "x.parquet", TEXTS[4:7])
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text(TEXTS[7])
    (folder / "v.zst").write_bytes(zstd(to_lines(TEXTS[8:])))
    return ["z.jsonl", "y.jsonl.gz", "x.parquet", "texts", "v.zst"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("workers", [1, 3])
def test_forms(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch, form: str, workers: int
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    monkeypatch.chdir(folder)
    FORMS[form](folder)
    flags = ["--output-prefix", tmp_path / "out", "--append-eod", "--workers", workers]
    code, stderr = run("--input", form, *flags)
    assert code == 0, stderr
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "reference", TEXTS, eod=True)
    assert names(tmp_path) == FILES
    written = {path.suffix: path.stat().st_mtime_ns for path in tmp_path.glob("out_text_document.*")}
    assert written[".json"] == max(written.values())  # or the cache of indices does not take it for theirs


@pytest.mark.parametrize("partitions", [1, 2, 4])
def test_mixed_inputs(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch, partitions: int
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = write_mixed(tmp_path)
    flags = ["--output-prefix", tmp_path / "out", "--workers", 2, "--partitions", partitions]
    code, stderr = run("--input", *inputs, *flags)
    assert code == 0, stderr
    order = [text for n in range(partitions) for text in TEXTS[n::partitions]]
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "reference", order)


def test_standard_input(tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(to_lines(TEXTS))))
    code, stderr = run("--input", "-", "--output-prefix", tmp_path / "out", "--workers", 2)
    assert code == 0, stderr
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "reference", TEXTS)


def test_command(
    tmp_path: Path,
    tool_command: list[str],
    tokenizers: dict[str, list[str]],
    megatron_tokenizer: Callable,
) -> None:
    """The tool as people run it, reading a pipe: a summary of one line, and nothing on stdout."""
    args = add_tokenizer_args(ArgumentParser()).parse_args(tokenizers["huggingface"])
    resolve_tokenizer(args)  # builds it, with warnings of Megatron's
    flags = [*tokenizers["huggingface"], "--input", "-", "--output-prefix", tmp_path / "out"]
    done = subprocess.run([*tool_command, *flags], input=to_lines(TEXTS), capture_output=True, check=True)
    tokens = [len(megatron_tokenizer("huggingface").tokenize(text)) for text in TEXTS]
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1, done.stderr
    summary = done.stderr.decode()
    assert summary.startswith(f"Wrote {len(TEXTS)} documents (2 empty), {sum(tokens)} tokens, from ")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.one_of(st.text(st.characters(max_codepoint=0xD7FF), max_size=30), st.lists(st.text("ab\n"))),
        min_size=1,
        max_size=12,
    ),
    end=st.sampled_from([b"\n", b"\r\n"]),
    whole=st.booleans(),
    chunk=st.integers(1, 200),
)
def test_any_documents(
    tmp_path: Path,
    run: Callable,
    monkeypatch: pytest.MonkeyPatch,
    texts: list[Any],
    end: bytes,
    whole: bool,
    chunk: int,
) -> None:
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", chunk)
    texts = [*texts, "not empty"]
    data = to_lines(texts).replace(b"\n", end)
    (tmp_path / "any.jsonl").write_bytes(data if whole else data.removesuffix(end))
    flags = ["--output-prefix", tmp_path / "out", "--workers", 2, "--append-eod", "--overwrite"]
    code, stderr = run("--input", tmp_path / "any.jsonl", *flags)
    assert code == 0, stderr
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "reference", texts, eod=True)


def test_report(tmp_path: Path, run: Callable, write_lines: Callable) -> None:
    lines = write_lines(tmp_path / "in.jsonl", [{"text": "ab", "title": "c"}] * 10)
    flags = ["--input", lines, "--output-prefix", tmp_path / "new" / "out", "--log-interval", 10]
    code, stderr = run(*flags, "--json-keys", "text", "title", "text", "--append-eod")
    progress, summary = stderr.splitlines()
    assert code == 0
    assert progress.startswith("Processed 10 documents (")
    assert "docs/s" in progress
    assert "MB/s" in progress
    read_ = lines.stat().st_size - 10  # without line ends
    assert summary.startswith(f"Wrote 10 documents, 50 tokens, from {read_} bytes in ")
    files = [
        f"{tmp_path}/new/out_{key}_document.{suffix}"
        for key in ("text", "title")
        for suffix in ("bin", "idx", "json")
    ]
    assert summary.endswith(" ".join(files))


@pytest.mark.parametrize("partitions", [1, 2])
def test_progress(tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch, partitions: int) -> None:
    """Ends at the size of the input, and counts what the summary counts."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(Progress, "add", lambda self, **what: seen.append(what))
    (tmp_path / "a.jsonl").write_bytes(to_lines(TEXTS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(to_lines(TEXTS)))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    flags = ["--output-prefix", tmp_path / "out", "--partitions", partitions]
    code, stderr = run("--input", tmp_path, *flags)
    assert code == 0, stderr
    assert size - len(seen) <= sum(what["weight"] for what in seen) <= size
    assert sum(what["documents"] for what in seen) == 2 * len(TEXTS)
    assert sum(what["tokens"] for what in seen) == 2 * sum(map(len, TEXTS))


def test_sidecar(tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = write_mixed(tmp_path)
    flags = ["--output-prefix", "out", "--append-eod", "--workers", "2"]
    code, stderr = run("--input", *inputs, *flags)
    assert code == 0, stderr
    sidecar = json.loads((tmp_path / "out_text_document.json").read_text())
    sizes = [len(text) + 1 for text in TEXTS if text]
    assert (sidecar["documents"], sidecar["sequences"]) == (len(TEXTS), len(sizes))
    assert (sidecar["tokens"], sidecar["dtype"]) == (sum(sizes), "uint16")
    assert sidecar["skipped"] == {}
    paths = [*inputs[:3], "texts/a.txt", inputs[4]]
    stats = {path: os.stat(path) for path in paths}  # noqa: PTH116
    assert [(one["path"], one["bytes"], one["modified"]) for one in sidecar["inputs"]] == [
        (path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()
    ]
    assert sidecar["command"] == ["preprocess_data.py", "--input", *inputs, *flags]
    for suffix in ("bin", "idx"):
        data = Path(f"out_text_document.{suffix}").read_bytes()
        assert sidecar["sha256"][suffix] == hashlib.sha256(data).hexdigest()


def test_training_reads_it(tmp_path: Path, run: Callable) -> None:
    """The samples of a ``GPTDataset`` are the documents, shuffled, in pieces."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from megatron.core.tokenizers import MegatronTokenizer

    (tmp_path / "in.jsonl").write_bytes(to_lines(TEXTS))
    code, stderr = run("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--append-eod")
    assert code == 0, stderr
    prefix = str(tmp_path / "out_text_document")
    indexed = IndexedDataset(prefix)
    written = [[*map(ord, text), 0] for text in TEXTS if text]
    assert [indexed[n].tolist() for n in range(len(indexed))] == written

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=5,
        split="1",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=MegatronTokenizer.from_pretrained(
            metadata_path={"library": "null-text"}, vocab_size=256, eod_id=0
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    sequences = np.arange(len(indexed), dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, sequences, 60, Split.train, config)
    stream = [token for document in dataset.document_index for token in written[document]]
    for n in range(60):
        start = 5 * int(dataset.shuffle_index[n])
        assert dataset[n]["tokens"].tolist() == stream[start : start + 5]
