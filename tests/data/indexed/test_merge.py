"""Merged datasets: Megatron's bytes, and clear refusals."""

from __future__ import annotations

import errno
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_periln.data.indexed.format import HEADER, MAGIC, VERSION
from megatron_periln.data.indexed.merge import find_datasets, merge_datasets
from tests.data.companions import (
    SMALL,
    TOOLS,
    WITHOUT_MEGATRON,
    build,
    content,
    megatron_merge,
    random_documents,
)

TOOL = TOOLS / "merge_datasets.py"


@pytest.mark.parametrize(
    ("dtype", "modes", "kernel"),
    [(np.uint16, False, True), (np.int32, True, True), (np.int64, False, False), (np.uint16, True, False)],
)
def test_bytes_are_megatrons(
    tmp_path: Path,
    run_merge: Callable,
    monkeypatch: pytest.MonkeyPatch,
    dtype: type,
    modes: bool,
    kernel: bool,
) -> None:
    """Also in small blocks, and where the kernel cannot copy."""
    monkeypatch.setattr("megatron_periln.data.indexed.format.BLOCK", 7)
    monkeypatch.setattr("megatron_periln.data.indexed.merge.COPY_BLOCK", 13)
    if not kernel:
        monkeypatch.setattr("os.copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "")))
    prefixes = [build(tmp_path / f"in{n}", random_documents(n), dtype, modes) for n in range(3)]
    megatron_merge(prefixes, tmp_path / "expected", dtype, modes)
    code, stdout, stderr = run_merge("--inputs", *prefixes, "--output-prefix", tmp_path / "out")
    assert code == 0, stderr
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    merged = IndexedDataset(str(tmp_path / "out"), multimodal=modes)
    documents = sum(len(random_documents(n)) for n in range(3))
    assert f"Merged 3 datasets, {documents} documents, {len(merged)} sequences" in stdout
    # A negative control: another order gives other bytes.
    megatron_merge(prefixes[::-1], tmp_path / "reversed", dtype, modes)
    assert content(tmp_path / "out") != content(tmp_path / "reversed")


def test_gpt_dataset_reads_the_merged(tmp_path: Path, pair: list[str]) -> None:
    merge_datasets(pair, str(tmp_path / "out"))
    merged, parts = IndexedDataset(str(tmp_path / "out")), [IndexedDataset(prefix) for prefix in pair]
    sequences = [sequence.tolist() for part in parts for sequence in part[:]]
    assert [sequence.tolist() for sequence in merged[:]] == sequences
    assert sequences == [[1, 2, 3], [4], [5, 6], [7], [8, 9], [10]]
    assert merged.document_indices.tolist() == [0, 2, 2, 3, 4, 6]


def test_gpt_dataset_samples(tmp_path: Path) -> None:
    """A GPTDataset gives the same samples of the merged dataset as of Megatron's merge."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split
    from megatron.core.tokenizers import MegatronTokenizer

    prefixes = [build(tmp_path / f"in{n}", random_documents(n)) for n in range(3)]
    merge_datasets(prefixes, str(tmp_path / "out"))
    megatron_merge(prefixes, tmp_path / "expected", np.uint16)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        split="1",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=MegatronTokenizer.from_pretrained(
            metadata_path={"library": "null-text"}, vocab_size=255, eod_id=255
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    samples = []
    for name in ("out", "expected"):
        low_level = IndexedDataset(str(tmp_path / name))
        documents = np.arange(len(low_level.document_indices) - 1, dtype=np.int32)
        dataset = GPTDataset(low_level, str(tmp_path / name), documents, 40, Split.train, config)
        samples.append(np.stack([dataset[n]["tokens"].numpy() for n in range(40)]))
    assert (samples[0] == samples[1]).all()
    assert len(np.unique(samples[0])) > 100


def test_no_folder(tmp_path: Path, merge_refused: Callable, pair: list[str]) -> None:
    for absent in (tmp_path / "absent", pair[0]):
        message = merge_refused("--input", absent, "--output-prefix", tmp_path / "out")
        assert f"--input {absent}: no such folder; --inputs takes prefixes" in message


def test_a_folder_in_natural_order(tmp_path: Path, run_merge: Callable) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for n in (10, 9, 1, 2):
        build(folder / f"part_{n}", [[[n]]])
    (folder / "notes.txt").write_text("not a dataset")
    code, _, stderr = run_merge("--input", folder, "--output-prefix", tmp_path / "new" / "out")
    assert code == 0, stderr
    merged = IndexedDataset(str(tmp_path / "new" / "out"))
    assert np.concatenate(merged[:]).tolist() == [1, 2, 9, 10]


def test_globs_and_suffixes(tmp_path: Path) -> None:
    for n in (10, 2):
        build(tmp_path / f"part_{n}", [[[n]]])
    odd = build(tmp_path / "odd[1]", [[[1]]])
    parts = [str(tmp_path / "part_2"), str(tmp_path / "part_10")]
    assert find_datasets([f"{tmp_path}/part_*"]) == parts
    assert find_datasets([f"{tmp_path}/part_*.bin", odd]) == [*parts, odd]
    assert find_datasets([f"{name}.idx" for name in reversed(parts)]) == parts[::-1]


def test_unfit_names(tmp_path: Path, pair: list[str], merge_refused: Callable) -> None:
    def refusal(*inputs: object) -> str:
        return merge_refused("--inputs", *inputs, "--output-prefix", tmp_path / "out")

    assert f"{pair[0]}: given twice" in refusal(pair[0], f"{pair[0]}.bin")
    assert "no dataset matches this glob" in refusal(f"{tmp_path}/c*")
    assert "no such dataset" in refusal(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no .bin and .idx files in this folder" in refusal(tmp_path / "empty")
    Path(f"{pair[1]}.idx").unlink()
    assert "b.idx: no such file, though b.bin is there" in refusal(tmp_path)


def test_mixed_dtypes(tmp_path: Path, merge_refused: Callable, pair: list[str]) -> None:
    other = build(tmp_path / "c", SMALL, np.int32)
    error = merge_refused("--inputs", *pair, other, "--output-prefix", tmp_path / "out")
    assert f"(uint16: {pair[0]}, {pair[1]}; int32: {other})" in error
    assert "same tokenizer" in error


def test_mixed_modes(tmp_path: Path, merge_refused: Callable, pair: list[str]) -> None:
    other = build(tmp_path / "c", SMALL, modes=True)
    arguments = ("--output-prefix", tmp_path / "out")
    assert f"{pair[0]}: has no modes" in merge_refused("--inputs", other, pair[0], *arguments)
    assert "--multimodal was given" in merge_refused("--inputs", *pair, "--multimodal", *arguments)


@pytest.mark.parametrize(
    ("suffix", "damage", "expected"),
    [
        (".bin", lambda data: data[:-1], "truncated: 11 bytes"),
        (".bin", lambda data: data + b"\0\0", "a.bin: too long: 14 bytes, but a.idx accounts for 12"),
        (".idx", lambda data: data[:-1], "truncated"),
        (".idx", lambda data: b"junk" + data[4:], "not an indexed dataset"),
        (".idx", lambda data: patched(data, 46, "<3q", 4, 0, 8), "not back to back"),
        (".idx", lambda data: patched(data, 46, "<3q", 0, 6, 6), "not back to back"),
        (".idx", lambda data: patched(data, 34, "<3i", 3, -1, 2), "negative length"),
        (".idx", lambda data: patched(data, 70, "<q", 1), "first document starts at 1, not 0"),
        (".idx", lambda data: patched(data, 78, "<2q", 3, 2), "document ends before it starts"),
    ],
)
@pytest.mark.parametrize("block", [1 << 20, 2])
def test_damaged_inputs(
    tmp_path: Path,
    pair: list[str],
    merge_refused: Callable,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    damage: Callable[[bytes], bytes],
    expected: str,
    block: int,
) -> None:
    monkeypatch.setattr("megatron_periln.data.indexed.format.BLOCK", block)
    path = Path(pair[0] + suffix)
    path.write_bytes(damage(path.read_bytes()))
    error = merge_refused("--inputs", pair[1], pair[0], "--output-prefix", tmp_path / "out")
    assert expected in error
    assert str(path.with_suffix("")) in error


def patched(data: bytes, offset: int, layout: str, *values: int) -> bytes:
    new = struct.pack(layout, *values)
    return data[:offset] + new + data[offset + len(new) :]


def test_existing_output(
    tmp_path: Path, pair: list[str], run_merge: Callable, merge_refused: Callable
) -> None:
    arguments = ("--inputs", *pair, "--output-prefix", tmp_path / "out")
    run_merge(*arguments)
    first = content(tmp_path / "out")
    Path(f"{pair[0]}.bin").write_bytes(bytes(12))
    assert "out.bin exists: choose another --output-prefix or pass --overwrite" in merge_refused(*arguments)
    assert run_merge(*arguments, "--overwrite")[0] == 0
    assert content(tmp_path / "out") != first


def test_output_is_an_input(tmp_path: Path, pair: list[str], merge_refused: Callable) -> None:
    (tmp_path / "link.bin").symlink_to(f"{pair[0]}.bin")
    for output in (pair[0], tmp_path / "x" / ".." / "a", tmp_path / "link"):
        (tmp_path / "x").mkdir(exist_ok=True)
        error = merge_refused("--inputs", *pair, "--output-prefix", output, "--overwrite")
        assert "is the output and an input" in error


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large index is never in memory as a whole."""
    sequences, prefix = 1_000_000, tmp_path / "a"
    Path(f"{prefix}.bin").write_bytes(bytes(2 * sequences))
    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, 8, sequences, sequences + 1))
        stream.write(np.ones(sequences, np.int32).tobytes())
        stream.write(np.arange(0, 2 * sequences, 2).tobytes())
        stream.write(np.arange(sequences + 1).tobytes())
    peaks = []
    for block in (1 << 14, 1 << 20):
        monkeypatch.setattr("megatron_periln.data.indexed.format.BLOCK", block)
        tracemalloc.start()
        merge_datasets([str(prefix)], str(tmp_path / "out"), overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert content(tmp_path / "out") == content(prefix)
    assert peaks[0] < 2_000_000 < peaks[1]


def test_the_tool_starts_without_megatron(tmp_path: Path, pair: list[str]) -> None:
    arguments = [str(TOOL), "--inputs", *pair, "--output-prefix", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", WITHOUT_MEGATRON, *arguments], check=True)
    assert (tmp_path / "out.idx").exists()
