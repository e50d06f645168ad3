"""``inspect_dataset.py``: what it prints, and every damage named."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_periln.data.indexed.inspection import LengthCounts, inspect, verify
from megatron_periln.data.indexed.sidecar import Sidecar, sha256_of
from megatron_periln.errors import PreprocessError, UsageError
from tests.data.companions import (
    SIDECAR,
    SMALL,
    TOOLS,
    WITHOUT_MEGATRON,
    build,
    load_tool,
    random_documents,
    refusal,
    run_tool,
    write_sidecar,
)

TOOL = TOOLS / "inspect_dataset.py"


@pytest.fixture
def run() -> Callable[..., str]:
    """Run the tool; return what it prints."""

    def run_inspect(*argv: object) -> str:
        code, stdout, stderr = run_tool("inspect_dataset", *argv)
        assert (code, stderr) == (0, "")
        return stdout

    return run_inspect


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    return partial(refusal, "inspect_dataset", tmp_path)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return build(tmp_path / "d", SMALL)


def write_own_sidecar(prefix: str, **changes: Any) -> Sidecar:
    sha256 = {suffix: sha256_of(f"{prefix}.{suffix}") for suffix in ("bin", "idx")}
    return write_sidecar(prefix, **{"sequences": 3, "sha256": sha256, **changes})


def patch(path: str, offset: int, new: bytes) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:offset] + new + data[offset + len(new) :])


def test_text(run: Callable, prefix: str) -> None:
    text = run(prefix)
    assert "documents  3 (1 empty)" in text
    assert "sequences  3" in text
    assert "tokens     6 (uint16)" in text
    assert "sidecar    none" in text
    assert "tokens in a document: min 0, median 2, mean 2.0, p99 3.96, max 4" in text
    assert "tokens in a sequence: min 1, median 2, mean 2.0, p99 2.98, max 3" in text
    assert f"    0  {'#' * 40}  1\n    1  {' ' * 40}  0\n  2-3  {'#' * 40}  1\n" in text


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_the_name_of_a_file(run: Callable, prefix: str, suffix: str) -> None:
    assert run(prefix + suffix) == run(prefix)


def test_decoding_needs_a_tokenizer(refused: Callable, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is said before anything is read."""
    monkeypatch.setattr(
        load_tool("inspect_dataset"), "inspect", lambda _: pytest.fail("work before the check")
    )
    assert "--tokenizer-type is missing" in refused(prefix, "--decode", 1)


def test_json(run: Callable, prefix: str) -> None:
    sidecar = write_own_sidecar(prefix)
    content = json.loads(run(prefix, "--json", "--verify"))
    counts = [content[name] for name in ("documents", "sequences", "tokens", "dtype", "empty_documents")]
    assert counts == [3, 3, 6, "uint16", 1]
    assert content["document_lengths"]["histogram"][2] == {"from": 2, "to": 3, "count": 1}
    assert Sidecar(**content["sidecar"]) == sidecar
    assert content["verification"] == {"checksums": True, "smallest": 1, "largest": 6, "vocab_size": 400}


def test_verified(run: Callable, prefix: str) -> None:
    text = run(prefix, "--verify")
    assert "checksums  not compared: no sidecar" in text
    assert "token ids  1 to 6\n" in text
    write_own_sidecar(prefix)
    text = run(prefix, "--verify")
    assert "checksums  as in the sidecar" in text
    assert "token ids  1 to 6 of 400\n" in text
    assert "SentencePieceTokenizer with 400 ids by megatron" in text
    assert 'skipped: "malformed JSON": 2' in text


def test_every_changed_byte_is_noticed(prefix: str) -> None:
    write_own_sidecar(prefix)
    verify(inspect(prefix))
    by_verifying = 0
    for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
        content = path.read_bytes()
        for place in range(len(content)):
            patch(str(path), place, bytes([content[place] ^ 1]))
            try:
                inspection = inspect(prefix)
            except UsageError:
                pass
            else:
                by_verifying += 1
                with pytest.raises(UsageError):
                    verify(inspection)
            path.write_bytes(content)
    assert by_verifying > 12  # those of the .bin file and some
    verify(inspect(prefix))


def test_truncated(refused: Callable, prefix: str) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2])
    assert "d.bin: truncated: 10 bytes, but d.idx needs 12" in refused(prefix)


def test_too_long(run: Callable, refused: Callable, prefix: str) -> None:
    with Path(f"{prefix}.bin").open("ab") as stream:
        stream.write(b"\0")
    run(prefix)
    assert "d.bin: too long: 13 bytes" in refused(prefix, "--verify")


def test_checksums(refused: Callable, prefix: str) -> None:
    write_own_sidecar(prefix)
    patch(f"{prefix}.bin", 0, b"\2")
    assert "d.bin: its SHA-256 is" in refused(prefix, "--verify")
    patch(f"{prefix}.bin", 0, b"\1")
    patch(f"{prefix}.idx", 34, struct.pack("<6i", 4, 0, 2, 0, 0, 8))
    patch(f"{prefix}.idx", 46, struct.pack("<3q", 0, 8, 8))
    assert "d.idx: its SHA-256 is" in refused(prefix, "--verify")


def test_vocabulary(run: Callable, refused: Callable, prefix: str) -> None:
    assert "of 7\n" in run(prefix, "--verify", "--vocab-size", 7)
    assert "holds token 6, but the vocabulary has 6" in refused(prefix, "--verify", "--vocab-size", 6)
    write_own_sidecar(prefix, tokenizer={**SIDECAR.tokenizer, "vocab_size": 5})
    assert "holds token 6, but the vocabulary has 5" in refused(prefix, "--verify")


@pytest.mark.parametrize("block", [4, 1 << 22])
def test_token_range(tmp_path: Path, refused: Callable, block: int) -> None:
    prefix = build(tmp_path / "d", [[[9, 8, 7, 8]]], np.int32)
    verified = verify(inspect(prefix), block=block)
    assert (verified.smallest, verified.largest) == (7, 9)
    patch(f"{prefix}.bin", 4, struct.pack("<i", -1))
    with pytest.raises(PreprocessError, match="holds the negative token -1"):
        verify(inspect(prefix), block=block)
    assert "holds the negative token -1" in refused(prefix, "--verify")


def test_floats_have_no_range(tmp_path: Path, run: Callable) -> None:
    prefix = build(tmp_path / "d", [[[1, 2]]], np.float32)
    assert "token ids  None" in run(prefix, "--verify")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokens": 7}, "d.json: tokens is 7, but 6 in d.idx"),
        ({"documents": 2}, "d.json: documents is 2, but 3"),
        ({"sequences": 4}, "d.json: sequences is 4, but 3"),
        ({"dtype": "int32"}, "d.json: dtype is int32, but uint16"),
    ],
)
def test_counts(refused: Callable, prefix: str, changes: dict[str, Any], expected: str) -> None:
    write_own_sidecar(prefix, **changes)
    assert expected in refused(prefix)


def test_damage(refused: Callable, prefix: str) -> None:
    Path(f"{prefix}.json").write_text("{")
    assert "d.json: malformed JSON" in refused(prefix)
    Path(f"{prefix}.json").unlink()
    patch(f"{prefix}.idx", 78, struct.pack("<2q", 3, 2))
    assert "a document ends before it starts" in refused(prefix)
    patch(f"{prefix}.idx", 78, struct.pack("<2q", 2, 2))
    patch(f"{prefix}.idx", 34, struct.pack("<i", -1))
    assert "negative length" in refused(prefix)
    Path(f"{prefix}.idx").unlink()
    assert "d.idx: no such file" in refused(prefix)
    assert "no such dataset" in refused(f"{prefix}x")


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = 1_000_000
    builder = IndexedDatasetBuilder(f"{tmp_path}/d.bin", dtype=np.uint16)
    builder.data_file.write(bytes(2 * sequences))
    builder.sequence_lengths = [np.int32(1)] * sequences
    builder.document_indices = np.arange(sequences + 1)  # type: ignore[assignment]
    builder.finalize(f"{tmp_path}/d.idx")
    peaks = []
    for block in (1 << 14, 1 << 20):
        monkeypatch.setattr("megatron_periln.data.indexed.format.BLOCK", block)
        tracemalloc.start()
        inspection = inspect(f"{tmp_path}/d")
        verify(inspection, block=1 << 14)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert inspection.document_lengths.max == inspection.sequence_lengths.min == 1
    assert peaks[0] < 8_000_000 < 16_000_000 < peaks[1]


def test_the_tool_starts_without_megatron(prefix: str) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_MEGATRON, str(TOOL), prefix, "--verify"], check=True)


def test_a_reader_that_leaves(prefix: str) -> None:
    command = f"{sys.executable} {TOOL} {prefix} --json | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("{", "")


def check_statistics(found: Any, lengths: np.ndarray) -> None:
    assert found.count == len(lengths)
    assert found.empty == (lengths == 0).sum()
    assert (found.min, found.max) == (lengths.min(), lengths.max())
    assert found.median == np.median(lengths)
    assert found.p99 == pytest.approx(np.percentile(lengths, 99), rel=1e-12)
    assert found.mean == pytest.approx(lengths.mean(), rel=1e-12)
    for first, last, count in found.histogram:
        assert count == ((lengths >= first) & (lengths <= last)).sum()
    assert sum(count for *_, count in found.histogram) == len(lengths)
    bins = [(first, last) for first, last, _ in found.histogram]
    assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(bins))
    assert all(last == max(2 * first - 1, 0) for first, last in bins)


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_statistics_are_numpys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, seed: int
) -> None:
    monkeypatch.setattr("megatron_periln.data.indexed.format.BLOCK", block)
    monkeypatch.setattr(
        "megatron_periln.data.indexed.inspection.TABLE_SIZE", 5
    )  # most lengths take the other way
    documents = [[]] * seed + random_documents(seed)
    found = inspect(build(tmp_path / "d", documents, np.int32))
    sequences = IndexedDataset(found.dataset.prefix)
    check_statistics(found.sequence_lengths, np.array([len(sequence) for sequence in sequences[:]]))
    check_statistics(found.document_lengths, np.array([sum(map(len, document)) for document in documents]))
    assert found.dataset.info.tokens == sum(map(len, sequences[:]))


@pytest.mark.parametrize("size", [1, 2, 101, 5000])
def test_lengths_large_and_small(size: int) -> None:
    rng = np.random.default_rng(size)
    lengths = (2 ** rng.uniform(0, 34, size)).astype(np.int64) - 1
    counts = LengthCounts()
    for block in np.array_split(lengths, 7):
        counts.add(block)
    check_statistics(counts.statistics(), lengths)
