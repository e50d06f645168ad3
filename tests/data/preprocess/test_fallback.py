"""An encoder that is found not to be exact while it works is replaced by its reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_periln.data.preprocess import driver
from megatron_periln.data.preprocess.encode import ChunkEncoder
from megatron_periln.data.preprocess.partial_outputs import PartialOutputs
from megatron_periln.data.readers.sources import Block
from megatron_periln.data.readers.tasks import Task
from megatron_periln.data.tokenizers.encoders import BatchEncoder, ChosenEncoder, Encoded, choose_encoder
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer
from tests.data.preprocessing import FILES, by_megatron, names, read, to_lines

TEXTS = [f"text {n}" for n in range(10)] + ["wrong"] + [f"more {n}" for n in range(10)]


class Inexact:
    """Gives another token for the last character of what contains wrong; cannot do what contains panic."""

    name = "inexact"

    def __init__(self, reference: BatchEncoder) -> None:
        self.reference = reference

    def load(self) -> None:
        pass

    def encode(self, texts: list[str]) -> Encoded:
        if any("panic" in text for text in texts):
            raise RuntimeError("panic")
        ids, lengths = self.reference.encode(texts)
        ends = np.cumsum(lengths)[["wrong" in text for text in texts]]
        ids[ends - 1] += 1
        return ids, lengths


@pytest.fixture(autouse=True)
def inexact(monkeypatch: pytest.MonkeyPatch, stub: Callable) -> None:
    """Without --encoder, and with --encoder gigatoken, the inexact encoder is taken."""
    stub(lambda text: None)
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 50)

    def choose(resolved: ResolvedTokenizer, requested: str | None = None) -> ChosenEncoder:
        exact = choose_encoder(resolved)
        return ChosenEncoder(Inexact(exact.encoder), exact.encoder) if requested != "megatron" else exact

    monkeypatch.setattr(driver, "choose_encoder", choose)


@pytest.fixture
def flags(tmp_path: Path) -> list[object]:
    (tmp_path / "in.jsonl").write_bytes(to_lines(TEXTS))
    return ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--workers", 2]


DIFFERENCE = "'wrong' at token 4 inexact gives [114, 111, 110, 103], megatron"


def test_starts_again(tmp_path: Path, run: Callable, flags: list[object]) -> None:
    code, stderr = run(*flags)
    assert code == 0, stderr
    note, summary = stderr.splitlines()
    assert note.startswith(
        "note: the encoder inexact is not exact, starting again with megatron: for 'wrong'"
    )
    assert ", megatron): " in summary
    assert summary.startswith(f"Wrote {len(TEXTS)} documents, ")
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "reference", TEXTS)
    assert names(tmp_path) == FILES
    assert '"encoder": "megatron"' in (tmp_path / "out_text_document.json").read_text()


def test_the_next_run_goes_on_with_the_reference(
    tmp_path: Path, run: Callable, flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        add = PartialOutputs.add

        def interrupt(self: PartialOutputs, record: object) -> None:
            add(self, record)  # type: ignore[arg-type]
            if self.encoder and len(self.records) == 1:
                raise KeyboardInterrupt

        patch.setattr(PartialOutputs, "add", interrupt)
        assert run(*flags)[0] == 130
    assert names(tmp_path) == ["out.partial"]

    def choose(resolved: ResolvedTokenizer, requested: str | None = None) -> ChosenEncoder:
        exact = choose_encoder(resolved).encoder
        return ChosenEncoder(exact if requested == "megatron" else Inexact(exact), None)

    # Nothing is compared any more, so that only what was noted can tell.
    monkeypatch.setattr(driver, "choose_encoder", choose)
    code, stderr = run(*flags, "--resume")
    assert code == 0, stderr
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "reference", TEXTS)


@pytest.mark.parametrize("pipe", [False, True])
def test_cannot_start_again(
    tmp_path: Path,
    refused: Callable[..., str],
    flags: list[object],
    monkeypatch: pytest.MonkeyPatch,
    pipe: bool,
) -> None:
    """Where the encoder was asked for, or the input is gone; what it wrote is not kept."""
    if pipe:
        monkeypatch.setattr("sys.stdin", (tmp_path / "in.jsonl").open())
        message = refused(*flags, "--input", "-")
        assert message.startswith("error: the encoder inexact is not exact: for 'wrong'")
        assert message.endswith("; run again with --encoder megatron")
    else:
        message = refused(*flags, "--encoder", "gigatoken")
        assert message.startswith("error: --encoder inexact is not exact: for 'wrong'")
        assert message.endswith("; drop it")
    assert names(tmp_path) == []


def test_sampled_documents_that_cannot_be_encoded(
    tmp_path: Path, run: Callable, refused: Callable[..., str]
) -> None:
    """They are bad documents, not the end of the worker."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(to_lines(["a", "panic", "b"]))
    flags = ["--input", source, "--output-prefix", tmp_path / "out"]
    message = refused(*flags)
    assert f"{source}:2: byte 14: key 'text' cannot be tokenized: RuntimeError: panic" in message
    code, stderr = run(*flags, "--overwrite", "--on-error", "skip")
    assert code == 0, stderr
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "reference", ["a", "b"])


def test_sample() -> None:
    """At first some texts, then one character in 4,096; the start of a long text, some of a long list."""

    class Silent:
        name = "silent"

        def load(self) -> None:
            pass

        def encode(self, texts: list[str]) -> Encoded:
            return np.zeros(len(texts), np.uint32), np.ones(len(texts), np.int64)

    chunks = ChunkEncoder(Silent(), ["text"], np.dtype(np.uint16), sampled=True)
    task = Task(Block("file", 0, 1, to_lines(["x" * 1000] * 1000), 1))

    def sampled(task: Task) -> list[str]:
        return [text for sample in chunks.encode(task).samples for text in sample.texts]

    seen = sampled(task)
    assert 16 <= len(seen) <= 18
    for _ in range(99):
        seen += sampled(task)
    assert 38 <= len(seen) <= 46
    long = Task(Block("file", 0, 1, to_lines(["y" * 1_000_000]), 1))
    assert {len(text) for _ in range(100) for text in sampled(long)} == {16 << 10}
    lists = ChunkEncoder(Silent(), ["text", "title"], np.dtype(np.uint16), sampled=True)
    line = json.dumps({"text": ["z" * 1000] * 5000, "title": "t"}).encode() + b"\n"
    (sample,) = lists.encode(Task(Block("file", 0, 1, line, 1))).samples
    assert sum(map(len, sample.texts)) < 1.2 * (16 << 10)
    assert sample.texts[-1] == "t"  # of each key, though the first one's texts are enough
