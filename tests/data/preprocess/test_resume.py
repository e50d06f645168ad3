"""``--resume`` and ``--overwrite``: what is resumed, and what is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_periln.data.preprocess.journal import Record
from megatron_periln.data.preprocess.partial_outputs import PartialOutputs
from tests.data.compressions import COMPRESS
from tests.data.preprocessing import FILES, TEXTS, by_megatron, names, read, to_lines

Interrupted = Callable[..., list[object]]


pytestmark = pytest.mark.usefixtures("chunks_of_20_bytes")


@pytest.fixture
def interrupted(tmp_path: Path, tool: object, monkeypatch: pytest.MonkeyPatch, capsys: object) -> Interrupted:
    """Run the tool and interrupt it after some chunks; return its flags."""

    def run_interrupted(*more: object, chunks: int = 4) -> list[object]:
        source = tmp_path / "in.jsonl"
        if not source.exists():
            source.write_bytes(to_lines(TEXTS))
        flags = ["--input", source, "--output-prefix", tmp_path / "out", "--workers", 2, *more]
        with monkeypatch.context() as patch:
            add = PartialOutputs.add

            def add_and_interrupt(self: PartialOutputs, record: Record) -> None:
                add(self, record)
                if len(self.records) == chunks:
                    raise KeyboardInterrupt

            patch.setattr(PartialOutputs, "add", add_and_interrupt)
            assert tool.main(list(map(str, flags))) == 130  # type: ignore[attr-defined]
        message = capsys.readouterr().err  # type: ignore[attr-defined]
        assert message == "interrupted: what is done is kept: go on with --resume\n"
        assert names(tmp_path) == ["out.partial"]
        return flags

    return run_interrupted


def test_goes_on(tmp_path: Path, interrupted: Interrupted, run: Callable, stub: Callable) -> None:
    """Only with what is missing; flags that do not change the bytes may be others."""
    flags = interrupted("--append-eod", "--workers", 1, chunks=6)
    count = tmp_path / "count"

    def note(text: str) -> None:
        with count.open("a") as stream:
            stream.write("x")

    stub(note)
    count.write_text("")
    code, stderr = run(*flags, "--resume", "--workers", 3, "--encoder", "megatron", "--on-error", "skip")
    assert code == 0, stderr
    assert f"Wrote {len(TEXTS)} documents (2 empty)" in stderr
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "reference", TEXTS, eod=True)
    assert names(tmp_path) == FILES
    assert 0 < len(count.read_text()) <= len(TEXTS) - 4


def test_refused_without_a_flag(
    tmp_path: Path, interrupted: Interrupted, refused: Callable[..., str]
) -> None:
    flags = interrupted()
    message = refused(*flags)
    expected = "out.partial: an unfinished run; go on with --resume or start anew with --overwrite"
    assert expected in message
    assert names(tmp_path) == ["out.partial"]


def test_started_anew(tmp_path: Path, interrupted: Interrupted, run: Callable) -> None:
    flags = interrupted()
    (tmp_path / "in.jsonl").write_bytes(to_lines(["other"]))
    code, stderr = run(*flags, "--overwrite")
    assert code == 0, stderr
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "reference", ["other"])
    assert names(tmp_path) == FILES


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (["--append-eod"], "--append-eod was False and is True"),
        (["--json-keys", "text", "title"], r"--json-keys was \['text'\] and is \['text', 'title'\]"),
        (["--partitions", 2], "--partitions was 1 and is 2"),
        (["--shard", "0/2"], r"--shard was \[0, 1\] and is \[0, 2\]"),
        (["--max-bin-size", "1G"], "--max-bin-size was None and is 1073741824"),
        (["--max-document-bytes", 1000], "--max-document-bytes was 268435456 and is 1000"),
        (
            ["--max-document-bytes", 256 << 20],
            "--max-document-bytes was 268435456 and is '268435456, for",
        ),
        (["--input-format", "text"], "the input was"),
    ],
)
def test_changed_flags(
    interrupted: Interrupted, refused: Callable[..., str], run: Callable, change: list[object], name: str
) -> None:
    """Named in the error; nothing is lost by it."""
    flags = interrupted()
    message = refused(*flags, "--resume", *change)
    assert re.search(rf"out.partial: cannot go on: {name}.*; run as before, or start anew with", message)
    code, stderr = run(*flags, "--resume")
    assert code == 0, stderr


@pytest.mark.parametrize("change", ["content", "time", "another"])
def test_changed_input(
    tmp_path: Path, interrupted: Interrupted, refused: Callable[..., str], change: str
) -> None:
    flags = interrupted()
    source = tmp_path / "in.jsonl"
    match change:
        case "content":
            source.write_bytes(to_lines([*TEXTS, "more"]))
        case "time":
            os.utime(source, (1, 1))
        case "another":
            flags += ["--input", source, source]
    assert "out.partial: cannot go on: the input was [[" in refused(*flags, "--resume")


def test_small_files(tmp_path: Path, interrupted: Interrupted, run: Callable, refused: Callable) -> None:
    """Several are a chunk; a journal of a version that made each a chunk of its own is not gone on with."""
    texts = list("abcdefghijkl")
    files = [tmp_path / f"{text}.jsonl" for text in texts]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(to_lines([text]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 60)
        flags = interrupted("--input", *files, chunks=2)
        described = tmp_path / "out.partial" / "run.json"
        content = described.read_text()
        described.write_text(json.dumps({**json.loads(content), "the size of a chunk": 60}))
        message = refused(*flags, "--resume")
        assert "cannot go on: the size of a chunk was 60 and is [60, 'small files together']" in message
        described.write_text(content)
        os.utime(files[4], (1, 1))
        assert "cannot go on: the input's file 5 was ['" in refused(*flags, "--resume")
        message = refused(*flags, "--input", files[0], "--resume")
        assert "cannot go on: the input had 12 files and has 1" in message
        saved = json.loads(content)
        saved["the input"][4][3] = files[4].stat().st_mtime_ns
        described.write_text(json.dumps(saved))
        assert len((tmp_path / "out.partial" / "journal").read_text().splitlines()) == 2
        code, stderr = run(*flags, "--resume")
        assert code == 0, stderr
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "expected", texts)


def test_changed_chunks(
    interrupted: Interrupted, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = interrupted()
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 30)
    assert "cannot go on: the size of a chunk was 20 and is 30" in refused(*flags, "--resume")


def test_changed_tokenizer(
    interrupted: Interrupted, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = interrupted()
    monkeypatch.setattr("tests.data.characters.Characters.vocab_size", 257)
    assert "out.partial: cannot go on: the tokenizer was '" in refused(*flags, "--resume")


def test_a_pipe_is_not_resumed(
    tmp_path: Path, interrupted: Interrupted, refused: Callable[..., str], run: Callable
) -> None:
    """Nobody knows whether the same comes through it again."""
    flags = interrupted()
    message = refused(*flags, "--input", "-", "--resume")
    assert "--resume: a pipe cannot be read again; start anew with --overwrite" in message
    code, stderr = run(*flags, "--resume")
    assert code == 0, stderr


@pytest.mark.parametrize("suffix", [".gz", ".zstd", ".xz"])
def test_compressed_and_dealt_out(
    tmp_path: Path, interrupted: Interrupted, run: Callable, suffix: str
) -> None:
    """The chunks of a stream, and those of several partitions, are counted anew."""
    source = tmp_path / f"more.jsonl{suffix}"
    source.write_bytes(COMPRESS[suffix](to_lines(TEXTS)))
    more = ["--input", source, tmp_path / "in.jsonl", "--partitions", 2]
    flags = interrupted(*more, chunks=30)
    code, stderr = run(*flags, "--resume")
    assert code == 0, stderr
    texts = [*TEXTS, *TEXTS]
    expected = by_megatron(tmp_path / "reference", texts[0::2] + texts[1::2])
    assert read(tmp_path / "out_text_document") == expected


def test_damaged_data(tmp_path: Path, interrupted: Interrupted, run: Callable) -> None:
    """What does not lie on the disk as the journal says is encoded again."""
    flags = interrupted(chunks=8)
    partial = tmp_path / "out.partial" / "text_00000.bin"
    partial.write_bytes(bytes(partial.stat().st_size))
    code, stderr = run(*flags, "--resume")
    assert code == 0, stderr
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "reference", TEXTS)


def test_existing_outputs_stay(tmp_path: Path, interrupted: Interrupted, run: Callable) -> None:
    """Until all is encoded; those of a run that replaces more datasets go too."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(to_lines(["a" * 9] * 9))
    flags = ["--input", source, "--output-prefix", tmp_path / "out", "--max-bin-size", 40]
    code, stderr = run(*flags)
    assert code == 0, stderr
    before = {path: path.read_bytes() for path in tmp_path.glob("out*")}
    assert len(before) == 3 * 5
    source.write_bytes(to_lines(["b" * 9, "bad", *"cd"]).replace(b'"bad"', b""))
    code, stderr = run(*flags, "--overwrite")
    assert code == 1
    assert {path: path.read_bytes() for path in before} == before
    code, stderr = run(*flags, "--overwrite", "--on-error", "skip")
    assert code == 0, stderr
    assert names(tmp_path) == [f"out_text_document_00000.{suffix}" for suffix in ("bin", "idx", "json")]
