"""The sidecar of a dataset: what is written is read, and damage is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from megatron_periln.data.indexed.sidecar import Sidecar, is_sidecar, sha256_of, sidecar_path, utc_now
from megatron_periln.errors import PreprocessError
from tests.data.companions import SIDECAR


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = sidecar_path(tmp_path / "corpus_text_document")
    assert path.name == "corpus_text_document.json"
    SIDECAR.write(path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(PreprocessError) as caught:
        Sidecar.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert not is_sidecar(path)
    return message


def edited(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def test_what_is_written_is_read(path: Path) -> None:
    assert Sidecar.read(path) == SIDECAR
    assert is_sidecar(path)
    assert json.loads(path.read_text())["format_version"] == 1
    assert list(path.parent.iterdir()) == [path]


MANY = dataclasses.replace(
    SIDECAR,
    command=["preprocess_data.py", "--input", *map(str, range(20_000))],
    inputs=[{"path": f"in/{number}.jsonl", "bytes": 1} for number in range(20_000)],
    plan={"the input": list(range(20_000))},
)


def test_a_summary_reads_no_more_of_many_inputs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MANY.write(path)
    assert path.stat().st_size > 1 << 20
    read: list[int] = []
    opened = Path.open

    def counting(self: Path, *given: Any, **more: Any) -> Any:
        stream = opened(self, *given, **more)
        original = stream.read
        stream = MagicMock(wraps=stream)
        stream.__enter__.return_value = stream
        stream.read.side_effect = lambda *size: read.append(*size) or original(*size)
        return stream

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", counting)
        summary = Sidecar.read_summary(path)
    assert read == [1 << 16]
    assert summary == dataclasses.replace(MANY, command=[], inputs=[], plan={})


def test_a_summary_of_an_earlier_version(path: Path) -> None:
    """Its lists stand among the other fields."""
    edited(path, **{name: getattr(MANY, name) for name in ("command", "inputs", "plan")}, created="then")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: content[name] for name in sorted(content)}, indent=2))
    summary = Sidecar.read_summary(path)
    assert (summary.tokens, summary.tokenizer, summary.created) == (MANY.tokens, MANY.tokenizer, "then")


def test_a_summary_of_damage_is_refused(path: Path) -> None:
    path.write_text(path.read_text()[:300])
    with pytest.raises(PreprocessError, match="malformed JSON"):
        Sidecar.read_summary(path)


def test_fields_of_later_versions_are_tolerated(path: Path) -> None:
    tokenizer = {**SIDECAR.tokenizer, "new": 1}
    assert Sidecar.read(edited(path, new=[1, {"a": None}], tokenizer=tokenizer)).tokenizer["new"] == 1


def test_no_end_of_document(path: Path) -> None:
    tokenizer = {**SIDECAR.tokenizer, "eod": None, "digest": None}
    assert Sidecar.read(edited(path, tokenizer=tokenizer)).tokenizer["eod"] is None


def test_inputs_stand_there_once(path: Path) -> None:
    """What the plan says of each, too."""
    inputs = [{"path": f"in/{number}.jsonl", "bytes": number} for number in range(3)]
    plan = {"the input": [[item["path"], "jsonl", item["bytes"], 7] for item in inputs], "--shard": [0, 1]}
    sidecar = dataclasses.replace(SIDECAR, inputs=inputs, plan=plan)
    sidecar.write(path)
    assert path.read_text().count("in/1.jsonl") == 1
    assert Sidecar.read(path) == sidecar
    edited(path, inputs=inputs, plan=plan)  # of an earlier version
    assert Sidecar.read(path) == sidecar


def test_an_older_summary_has_no_list_elsewhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read to its first list as well."""
    MANY.write(path)
    path.write_text(path.read_text().replace('\n  "listed_in": {},', ""))
    assert "listed_in" not in path.read_text()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("read whole"))
    assert Sidecar.read_summary(path) == dataclasses.replace(MANY, command=[], inputs=[], plan={})


def test_an_older_one_has_no_plan(path: Path) -> None:
    content = json.loads(path.read_text())
    del content["plan"]
    path.write_text(json.dumps(content))
    assert Sidecar.read(path) == SIDECAR


@pytest.mark.parametrize(
    "name",
    [field.name for field in dataclasses.fields(Sidecar) if field.name not in ("plan", "listed_in")],
)
def test_missing_field(path: Path, name: str) -> None:
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(json.dumps(content))
    assert f"field {name!r} is missing" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"documents": "3"}, "field 'documents' is \"3\", not an integer"),
        ({"documents": True}, "field 'documents' is true, not an integer"),
        ({"tokens": 6.0}, "field 'tokens' is 6.0, not an integer"),
        ({"append_eod": 1}, "field 'append_eod' is 1, not true or false"),
        ({"dtype": None}, "field 'dtype' is null, not a string"),
        ({"command": "a b"}, "not a list, each a string"),
        ({"skipped": {"empty": "many"}}, "not an object, each an integer"),
        ({"tokenizer": [1]}, "field 'tokenizer' is [1], not an object"),
        ({"tokenizer": {"type": "T"}}, "field 'tokenizer.digest' is missing"),
        (
            {"tokenizer": {**SIDECAR.tokenizer, "eod": "2"}},
            "'tokenizer.eod' is \"2\", not an integer or null",
        ),
        ({"sha256": {"bin": "ab"}}, "field 'sha256.idx' is missing"),
        ({"inputs": [{"path": "a", "bytes": 1}, {"path": "b"}]}, "field 'inputs[1].bytes' is missing"),
        ({"inputs": ["a"]}, "field 'inputs' is [\"a\"], not a list"),
        ({"format_version": 2}, "format version 2, only 1 and older can be read; update megatron-periln"),
        ({"listed_in": {"file": "a"}}, "field 'listed_in.plan_sha256' is missing"),
        ({"plan": "p"}, "field 'plan' is \"p\", not an object"),
        ({"format_version": "1"}, "field 'format_version' is \"1\", not an integer"),
    ],
)
def test_wrong_field(path: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in refusal(edited(path, **changes))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "malformed JSON"),
        (b'{"text": "a"}\n{"text": "b"}\n', "malformed JSON: Extra data"),
        (b"[1]", "not a JSON object"),
        (b'"\xff"', "malformed JSON: 'utf-8' codec"),
        (b"[" * 100_000, "malformed JSON"),
    ],
)
def test_malformed(path: Path, content: bytes, expected: str) -> None:
    path.write_bytes(content)
    assert expected in refusal(path)


def test_a_cut_is_noticed(path: Path) -> None:
    content = path.read_bytes().rstrip()
    for size in range(0, len(content), 3):
        path.write_bytes(content[:size])
        refusal(path)


def test_missing(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(tmp_path / "none.json")


def test_a_corpus_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_periln.data.indexed.sidecar.MOST_BYTES", 10)
    assert "too many for the sidecar" in refusal(path)


def test_a_write_that_fails_leaves_the_old(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(PreprocessError, match=r"cannot be written: No space left on device"):
        dataclasses.replace(SIDECAR, tokens=7).write(path)
    assert Sidecar.read(path) == SIDECAR
    assert list(path.parent.iterdir()) == [path]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(PreprocessError, match="cannot be written: No such file"):
        SIDECAR.write(tmp_path / "none" / "corpus.json")


def test_checksum(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = bytes(range(256)) * 9
    path.write_bytes(content)
    for block in (1 << 22, 1000, 7):
        assert sha256_of(path, block=block) == hashlib.sha256(content).hexdigest()
    with pytest.raises(PreprocessError, match="none: cannot be read: No such file"):
        sha256_of(tmp_path / "none")


def test_now() -> None:
    assert abs(datetime.fromisoformat(utc_now()) - datetime.now(UTC)) < timedelta(seconds=5)


def test_import_is_light() -> None:
    code = "import sys, megatron_periln.data.indexed.sidecar; print({'torch', 'megatron'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
