"""Statistics of lengths are numpy's, of what Megatron reads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_periln.data.indexed.inspection import inspect
from megatron_periln.data.indexed.lengths import LengthCounts
from tests.data.companions import (
    build,
    random_documents,
)


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
    monkeypatch.setattr("megatron_periln.data.indexed.index_arrays.BLOCK", block)
    monkeypatch.setattr("megatron_periln.data.indexed.lengths._SMALL", 5)  # most lengths take the other way
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
