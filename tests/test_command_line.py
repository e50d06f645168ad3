"""Flags that are wrong: one line, from each of the tools for data."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_periln.command_line import exit_code
from tests.data.companions import refusal

TOOLS = ["preprocess_data", "inspect_dataset", "merge_datasets", "train_tokenizer"]


@pytest.mark.parametrize("name", TOOLS)
def test_unknown_flag(tmp_path: Path, name: str) -> None:
    assert refusal(name, tmp_path, "--zzz=1") == "error: unknown flag --zzz; --help lists the flags"


@pytest.mark.parametrize("name", TOOLS)
def test_missing_flag(tmp_path: Path, name: str) -> None:
    message = refusal(name, tmp_path)
    assert " required" in message
    assert message.endswith("; --help lists the flags")


@pytest.mark.parametrize("flag", ["--vocab_size", "--vocabsize"])
def test_misspelt_flag(tmp_path: Path, flag: str) -> None:
    message = refusal("train_tokenizer", tmp_path, flag, 1000)
    assert message == f"error: unknown flag {flag} (did you mean --vocab-size?); --help lists the flags"


def test_wrong_value(tmp_path: Path) -> None:
    flags = ["--input", "a", "--output-prefix", "b"]
    message = refusal("preprocess_data", tmp_path, *flags, "--shard", "8/8")
    assert message == (
        "error: argument --shard: 8/8 is not I/N with 0 <= I < N, such as 0/8; --help lists the flags"
    )
    # A value may look like a flag, and a flag may be cut short.
    flags = ["--input", "- -none", "--output-p", tmp_path / "b"]
    assert "error: --input - -none: no such file" in refusal("preprocess_data", tmp_path, *flags)


def test_a_checkpoint_that_torch_cannot_read(capsys: pytest.CaptureFixture[str]) -> None:
    """Its error is no Exception."""
    assert not issubclass(CheckpointException, Exception)

    def read() -> None:
        raise CheckpointException("no good", {})

    assert exit_code(read) == 1
    assert capsys.readouterr().err.startswith("error: a checkpoint can't be read: CheckpointException")

    def end() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        exit_code(end)
