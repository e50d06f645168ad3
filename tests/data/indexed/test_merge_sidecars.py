"""The sidecar of a merged dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_periln.data.indexed.sidecar import Sidecar
from tests.data.companions import (
    SIDECAR,
    content,
    write_sidecar,
)


def test_sums(tmp_path: Path, pair: list[str], run_merge: Callable) -> None:
    write_sidecar(pair[0], documents=3, sequences=3, tokens=6, skipped={"empty": 1, "malformed": 2})
    write_sidecar(
        pair[1],
        **{"documents": 2, "sequences": 3, "tokens": 4, "skipped": {"empty": 5}, "bytes_read": 2},
        **{"inputs": [{"path": "b.jsonl", "bytes": 2}], "json_key": "title"},
        **{"versions": {"megatron-periln": "0.2.0", "new": "1"}},
        tokenizer={**SIDECAR.tokenizer, "encoder": "other"},
    )
    assert run_merge("--inputs", *pair, "--output-prefix", tmp_path / "out")[0] == 0
    merged = Sidecar.read(tmp_path / "out.json")
    assert (merged.documents, merged.sequences, merged.tokens, merged.bytes_read) == (5, 6, 10, 42)
    assert merged.skipped == {"empty": 6, "malformed": 2}
    assert merged.inputs == [*SIDECAR.inputs, {"path": "b.jsonl", "bytes": 2}]
    assert merged.json_key == "text,title"
    assert merged.versions == {"megatron-periln": "0.1.0,0.2.0", "new": "1"}
    assert merged.command[:2] == ["tools/merge_datasets.py", "--inputs"]
    assert merged.created != SIDECAR.created
    bin_, idx = content(tmp_path / "out")
    assert merged.sha256 == {
        "bin": hashlib.sha256(bin_).hexdigest(),
        "idx": hashlib.sha256(idx).hexdigest(),
    }


def test_inputs_once(tmp_path: Path, pair: list[str], run_merge: Callable) -> None:
    """Shards of the same files name each."""
    inputs = [{"path": f"{name}.jsonl", "bytes": 20} for name in "ba"]
    for prefix, counts in zip(pair, ((3, 3, 6), (2, 3, 4)), strict=True):
        changes = dict(zip(("documents", "sequences", "tokens"), counts, strict=True))
        write_sidecar(prefix, inputs=inputs, **changes)
    assert run_merge("--inputs", *pair, "--output-prefix", tmp_path / "out")[0] == 0
    merged = Sidecar.read(tmp_path / "out.json")
    assert merged.inputs == inputs
    assert merged.bytes_read == 80


def test_not_all_have_one(tmp_path: Path, pair: list[str], run_merge: Callable) -> None:
    """Then the merged has none, and an old one goes."""
    write_sidecar(pair[0], sequences=3)
    write_sidecar(str(tmp_path / "out"))
    arguments = ("--inputs", *pair, "--output-prefix", tmp_path / "out")
    assert "out.json exists" in run_merge(*arguments)[2]
    assert run_merge(*arguments, "--overwrite")[0] == 0
    assert not (tmp_path / "out.json").exists()


def test_a_corpus_of_that_name_stays(tmp_path: Path, pair: list[str], run_merge: Callable) -> None:
    corpus = tmp_path / "out.json"
    corpus.write_text('{"text": "a"}\n{"text": "b"}\n')
    arguments = ("--inputs", *pair, "--output-prefix", tmp_path / "out", "--overwrite")
    assert run_merge(*arguments)[0] == 0
    for prefix, counts in zip(pair, ((3, 3, 6), (2, 3, 4)), strict=True):
        write_sidecar(prefix, **dict(zip(("documents", "sequences", "tokens"), counts, strict=True)))
    assert "out.json exists and is no sidecar" in run_merge(*arguments)[2]
    assert corpus.read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokens": 5}, "b.json: tokens is 5, but 4 in b.idx"),
        ({"documents": 3}, "b.json: documents is 3, but 2"),
        ({"sequences": 2}, "b.json: sequences is 2, but 3"),
        ({"dtype": "int32"}, "b.json: dtype is int32, but uint16"),
        ({"append_eod": False}, "b.json: append_eod is False, but True in"),
        ({"tokenizer": {**SIDECAR.tokenizer, "digest": "1e"}}, "b.json: tokenizer is"),
        ({"tokenizer": {**SIDECAR.tokenizer, "eod": 3}}, "b.json: tokenizer is"),
    ],
)
def test_sidecars_that_do_not_fit(
    tmp_path: Path, pair: list[str], merge_refused: Callable, changes: dict[str, Any], expected: str
) -> None:
    write_sidecar(pair[0], documents=3, sequences=3, tokens=6)
    write_sidecar(pair[1], **{"documents": 2, "sequences": 3, "tokens": 4, **changes})
    assert expected in merge_refused("--inputs", *pair, "--output-prefix", tmp_path / "out")


def test_a_damaged_sidecar(tmp_path: Path, pair: list[str], merge_refused: Callable) -> None:
    Path(f"{pair[0]}.json").write_text("{")
    assert "a.json: malformed JSON" in merge_refused("--inputs", *pair, "--output-prefix", tmp_path / "out")
