"""Files of a folder are taken in one of two orders, and a line says so where the two differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_periln.data.input_order import in_order
from tests.data.companions import run_tool

NAMES = ["part_10", "part_9", "part_1", "part_2"]
NATURAL, BYTES = ["part_1", "part_2", "part_9", "part_10"], ["part_1", "part_10", "part_2", "part_9"]


def ordered(names: list[str], order: str) -> tuple[list[str], list[tuple[str, str]]]:
    differing: list[tuple[str, str]] = []
    found = in_order(names, order, name=lambda name: (name,), differs=lambda *pair: differing.append(pair))
    return found, differing


@pytest.mark.parametrize(
    ("order", "expected", "pair"),
    [("natural", NATURAL, ("part_2", "part_10")), ("bytes", BYTES, ("part_10", "part_2"))],
)
def test_both_orders_and_where_they_part(order: str, expected: list[str], pair: tuple[str, str]) -> None:
    assert ordered(NAMES, order) == (expected, [pair])
    assert ordered(NAMES[1:], order) == (["part_1", "part_2", "part_9"], [])


def test_bytes_is_the_order_of_megatrons_tool() -> None:
    names = ["a", "a-1", "a1", "a10", "a2", "A", "é", "z", "1²2", "10", "9"]
    assert ordered(names, "bytes")[0] == sorted(names)


@pytest.mark.parametrize("names", [["part_02", "part_2"], ["part_2", "part_02"]])
def test_names_with_the_same_numbers_have_one_order(names: list[str]) -> None:
    assert ordered(names, "natural") == (["part_02", "part_2"], [])


def test_a_digit_that_is_no_decimal() -> None:
    assert ordered(["1²2", "1²10", "x"], "natural")[0] == ["1²2", "1²10", "x"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of JSON Lines; a document's only token is the number in the name of its file."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.jsonl").write_text(f'{{"text": "{name[5:]}"}}\n')
    return folder


def tokens(prefix: Path) -> list[int]:
    dataset = IndexedDataset(str(prefix))  # owns the memory of its sequences
    return np.concatenate(dataset[:]).tolist()


def test_preprocessing(run: Callable[..., tuple[int, str]], texts: Path, tmp_path: Path) -> None:
    flags = ["--input", texts, "--tokenizer-type", "NullTokenizer", "--vocab-size", 100, "--workers", 1]
    note = "note: part_10.jsonl is read before part_2.jsonl, in the order of bytes"
    for number, (order, expected, said) in enumerate(
        [
            ([], [1, 10, 2, 9], True),
            (["--input-order", "bytes"], [1, 10, 2, 9], False),
            (["--input-order", "natural"], [1, 2, 9, 10], False),
        ]
    ):
        code, stderr = run(*flags, *order, "--output-prefix", tmp_path / f"out{number}")
        assert code == 0, stderr
        assert tokens(tmp_path / f"out{number}_text_document") == expected
        assert stderr.count(note) == stderr.count("--input-order") == said


def test_globs_of_inputs(run: Callable[..., tuple[int, str]], texts: Path, tmp_path: Path) -> None:
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 100, "--workers", 1]
    code, stderr = run(
        "--input", f"{texts}/*.jsonl", "--output-prefix", tmp_path / "out", "--input-order", "natural", *flags
    )
    assert code == 0, stderr
    assert tokens(tmp_path / "out_text_document") == [1, 2, 9, 10]


def test_merging(run: Callable[..., tuple[int, str]], texts: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in NAMES:
        flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 100, "--workers", 1]
        assert run("--input", texts / f"{name}.jsonl", "--output-prefix", parts / name, *flags)[0] == 0
    note = (
        "note: part_1_text_document is taken before part_10_text_document; Megatron-LM's tool sorts by "
        "bytes, part_10_text_document before part_1_text_document: --input-order bytes\n"
    )
    for number, (order, expected, said) in enumerate(
        [
            ([], [1, 2, 9, 10], True),
            (["--input-order", "natural"], [1, 2, 9, 10], False),
            (["--input-order", "bytes"], [10, 1, 2, 9], False),
        ]
    ):
        output = tmp_path / f"merged{number}"
        code, _, stderr = run_tool("merge_datasets", "--input", parts, *order, "--output-prefix", output)
        assert code == 0, stderr
        assert tokens(output) == expected
        assert stderr.count(note) == stderr.count("--input-order") == said
