"""Documents that cannot be encoded: ``--on-error stop``, ``skip`` and ``quarantine``."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_periln.data.preprocess.journal import Record
from megatron_periln.data.preprocess.partial_outputs import PartialOutputs
from megatron_periln.errors import PreprocessError
from tests.data.preprocessing import by_megatron, names, read, to_lines

LIMIT = 1000
BAD: dict[str, tuple[str, bytes]] = {
    "malformed": ("malformed JSON", b'{"text": "a", "title": "b"'),
    "cannot be read": ("malformed JSON", b"[" * 900),
    "not UTF-8": ("not UTF-8", b'{"text": "\xff\xed\xa0\x80", "title": "b"}\r'),
    "missing key": ("missing key", b'{"text": "a", "body": "b"}'),
    "not a string": ("not a string", b'{"text": "a", "title": null}'),
    "a list with a number": ("not a string", b'{"text": "a", "title": ["a", 1]}'),
    "lone surrogate": ("lone surrogate", b'{"text": "a\\udc80", "title": "b"}'),
    "empty": ("empty line", b""),
    "not an object": ("not an object", b'["text"]'),
    "too large": ("too large", b'{"text": "%s", "title": ""}' % (b"x" * LIMIT)),
    "token id": ("token id", '{"text": "a", "title": "\U0001f642", "n": 1.0}'.encode()),
    "not tokenizable": ("not tokenizable", b'{"text": "panic", "title": "b", "n": 1e2}'),
}
"""For each: what is wrong, and a line of which the other key may be good."""


class PanicError(BaseException):
    """Stands in for ``pyo3_runtime.PanicException``."""


def panic(text: str) -> None:
    if text == "panic":
        raise PanicError("stack\noverflow")
    if text == "slow":
        time.sleep(0.3)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, stub: Callable) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes long
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 100)
    stub(panic)


@pytest.fixture
def flags(tmp_path: Path) -> list[object]:
    return [
        *("--output-prefix", tmp_path / "out", "--json-keys", "text", "title", "--workers", 2),
        *("--max-document-bytes", LIMIT),
    ]


def good(number: int) -> bytes:
    return json.dumps({"text": f"good {number}", "title": f"{number}"}).encode()


def check_good_ones(tmp_path: Path, number: int) -> None:
    """Both datasets have the good documents and no other."""
    for key, text in (("text", "good {}"), ("title", "{}")):
        expected = by_megatron(tmp_path / "reference", [text.format(n) for n in range(number)])
        assert read(tmp_path / f"out_{key}_document") == expected


def fail(error: Exception, *_: object) -> None:
    raise error


def original(content: str) -> bytes:
    return content.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", BAD)
def test_stop(
    tmp_path: Path,
    refused: Callable[..., str],
    flags: list[object],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    suffix: str,
) -> None:
    """Names the file, the line and the byte; nothing is left, as no chunk was finished."""
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", 1 << 20)
    source = tmp_path / f"in.jsonl{suffix}"
    data = b"\n".join([good(0), good(1), BAD[name][1], good(2), b"worse", b""])
    source.write_bytes(gzip.compress(data) if suffix else data)
    message = refused("--input", source, *flags)
    assert message.startswith(f"error: {source}:3: byte {len(good(0)) + len(good(1)) + 2}: ")
    assert names(tmp_path) == []


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_skip(tmp_path: Path, run: Callable, flags: list[object], suffix: str) -> None:
    """The datasets of all keys lack the same documents."""
    source = tmp_path / f"in.jsonl{suffix}"
    lines = [line for n, (_, bad) in enumerate(BAD.values()) for line in (good(n), bad)]
    data = b"".join(line + b"\n" for line in lines)
    source.write_bytes(gzip.compress(data) if suffix else data)
    code, stderr = run("--input", source, *flags, "--on-error", "skip")
    assert code == 0, stderr
    check_good_ones(tmp_path, len(BAD))
    counts = {kind: [kind for kind, _ in BAD.values()].count(kind) for kind, _ in BAD.values()}
    reasons = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    assert f"Skipped {len(BAD)} documents: {reasons}\nWrote {len(BAD)} documents, " in stderr
    for key in ("text", "title"):
        sidecar = json.loads((tmp_path / f"out_{key}_document.json").read_text())
        assert sidecar["skipped"] == counts
        assert sidecar["documents"] == len(BAD)
    assert not (tmp_path / "out_quarantine.jsonl").exists()


@pytest.mark.parametrize("chunk", [100, 1 << 20])
def test_quarantine(
    tmp_path: Path, run: Callable, flags: list[object], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Of several files, one compressed: the place of each, what is wrong, and its bytes."""
    monkeypatch.setattr("megatron_periln.data.preprocess.plan.CHUNK_BYTES", chunk)
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl"]
    expected, first = [], 0
    for source in sources:
        data, number = b"", 0
        for kind, bad in BAD.values():
            data += good(first) + b"\n"
            expected.append((str(source), number + 2, len(data), kind, None if kind == "too large" else bad))
            data += bad + b"\n"
            number, first = number + 2, first + 1
        source.write_bytes(gzip.compress(data) if source.suffix == ".gz" else data)
    code, stderr = run("--input", *sources, *flags, "--on-error", "quarantine")
    assert code == 0, stderr
    check_good_ones(tmp_path, first)
    quarantine = tmp_path / "out_quarantine.jsonl"
    entries = [json.loads(line) for line in quarantine.read_text(encoding="ascii").splitlines()]
    for entry in entries:
        assert list(entry) == ["path", "number", "byte", "kind", "reason", "content"]
        assert entry["reason"]
    assert [
        (
            entry["path"],
            entry["number"],
            entry["byte"],
            entry["kind"],
            None if entry["content"] is None else original(entry["content"]),
        )
        for entry in entries
    ] == expected
    assert stderr.rstrip().endswith(str(quarantine))


def test_plain_text(tmp_path: Path, run: Callable, refused: Callable[..., str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"good")
    (tmp_path / "b.txt").write_bytes(b"not \xff UTF-8\n")
    (tmp_path / "c.txt").write_bytes(b"x" * 2000)
    flags = ["--input", tmp_path, "--output-prefix", tmp_path / "out", "--max-document-bytes", 1000]
    message = refused(*flags)
    assert f"{tmp_path}/b.txt:1: byte 0: not UTF-8 at byte 5 of the file: invalid start byte" in message
    code, stderr = run(*flags, "--on-error", "quarantine")
    assert code == 0, stderr
    assert "Skipped 2 documents: 1 not UTF-8, 1 too large\n" in stderr
    entries = [json.loads(line) for line in (tmp_path / "out_quarantine.jsonl").read_text().splitlines()]
    assert [entry["path"] for entry in entries] == [f"{tmp_path}/b.txt", f"{tmp_path}/c.txt"]
    assert original(entries[0]["content"]) == b"not \xff UTF-8\n"
    assert entries[1]["content"] is None
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "reference", ["good"])


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_is_named(tmp_path: Path, refused: Callable[..., str], workers: int) -> None:
    """Whatever worker is the faster."""
    source = tmp_path / "in.jsonl"
    lines = [b'{"text": "slow"}', b"bad", *([b"worse"] * 50)]
    source.write_bytes(b"\n".join(line.ljust(99) for line in lines))
    message = refused("--input", source, "--output-prefix", tmp_path / "out", "--workers", workers)
    assert f"{source}:2: byte 100: malformed JSON" in message


def test_more_can_be_skipped_later(tmp_path: Path, run: Callable, refused: Callable[..., str]) -> None:
    """A run that stopped goes on with --on-error skip, and has the documents before."""
    source = tmp_path / "in.jsonl"
    texts = [f"{n} {'x' * 90}" for n in range(10)]
    source.write_bytes(to_lines(texts[:5]) + b"bad\n" + to_lines(texts[5:]))
    flags = ["--input", source, "--output-prefix", tmp_path / "out"]
    assert f"{source}:6: " in refused(*flags)
    code, stderr = run(*flags, "--resume", "--on-error", "skip")
    assert code == 0, stderr
    assert read(tmp_path / "out_text_document") == by_megatron(tmp_path / "reference", texts)


@pytest.mark.parametrize("on_error", ["skip", "quarantine"])
def test_bad_documents_do_not_stay_in_memory(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    """With skip a worker sends their number alone; with quarantine they stay in the journal."""
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\n' + b"bad\n" * 99)
    sent, kept, add = [], [], PartialOutputs.add

    def watched(outputs: PartialOutputs, record: Record) -> None:
        sent.extend(record.bad)
        add(outputs, record)
        kept.extend(outputs.records[-1].bad)

    monkeypatch.setattr(PartialOutputs, "add", watched)
    flags = ["--output-prefix", tmp_path / "out", "--on-error", on_error]
    assert run("--input", tmp_path / "in.jsonl", *flags)[0] == 0
    assert len(sent) == (99 if on_error == "quarantine" else 0)
    assert kept == []


def test_skipped_ones_cannot_go_in_quarantine(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that did not keep them does not go on as if it had."""
    (tmp_path / "in.jsonl").write_bytes(b'bad\n{"text": "a"}\n')
    flags = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "megatron_periln.data.preprocess.finalize.finalize_dataset",
            partial(fail, PreprocessError("full")),
        )
        assert "full" in refused(*flags, "--on-error", "skip")
    assert "were skipped with --on-error skip" in refused(*flags, "--on-error", "quarantine")


@pytest.mark.parametrize("on_error", ["skip", "quarantine"])
def test_nothing_is_good(tmp_path: Path, refused: Callable[..., str], on_error: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"bad\n" * 10)
    flags = ["--output-prefix", tmp_path / "out", "--on-error", on_error]
    message = refused("--input", tmp_path / "in.jsonl", *flags)
    assert f"{tmp_path}/out_text_document: every document is empty or was skipped, so there are no" in message
    assert names(tmp_path) == []


def test_a_quarantine_is_not_overwritten(tmp_path: Path, run: Callable, refused: Callable[..., str]) -> None:
    source, quarantine = tmp_path / "in.jsonl", tmp_path / "out_quarantine.jsonl"
    source.write_bytes(b'bad\n{"text": "a"}\n')
    quarantine.write_text("precious")
    flags = ["--input", source, "--output-prefix", tmp_path / "out", "--on-error", "quarantine"]
    assert f"{quarantine} exists: choose another --output-prefix or pass --overwrite" in refused(*flags)
    assert quarantine.read_text() == "precious"
    code, stderr = run(*flags, "--overwrite")
    assert code == 0, stderr
    assert json.loads(quarantine.read_text())["content"] == "bad"
