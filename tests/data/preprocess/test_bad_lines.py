"""A bad line stops the run with its place, what is wrong with it, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def bad_line(
    tmp_path: Path, refused: Callable[..., str], tokenizers: dict[str, list[str]]
) -> Callable[..., str]:
    """Preprocess two good lines and then ``content``; return the error, which names the third line."""

    def run_bad_line(content: bytes, *flags: object, kind: str = "huggingface") -> str:
        source = tmp_path / "in.jsonl"
        source.write_bytes(b'{"text": "good"}\n{"text": ["good", "too"]}\n' + content)
        output = tmp_path / "output" / "out"
        message = refused("--input", source, "--output-prefix", output, *tokenizers[kind], *flags)
        assert list(output.parent.iterdir()) == []
        assert f"{source}:3: " in message
        assert "; --on-error skip or quarantine skips such documents" in message
        return message

    return run_bad_line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"\n', "malformed JSON at column 13: Expecting ',' delimiter"),
        (b'{"text": "a"} {"text": "b"}\n', "malformed JSON at column 15: Extra data"),
        (b"text\n", "malformed JSON at column 1"),
        (b"[" * 100_000 + b"\n", "JSON that cannot be read"),
        (b'{"text": 1' + b"0" * 5000 + b"}\n", "JSON that cannot be read"),
        (b'{"text": "\xff"}\n', "not UTF-8 at byte 11"),
        (b'\n{"text": "b"}\n', "empty line; each line must be a JSON object"),
        (b"  \n", "empty line"),
        (b'["a"]\n', "a list; each line must be a JSON object"),
        (b'"a"\n', "a string;"),
        (b"null\n", ": null;"),
        (b"{}\n", "no key 'text'; the keys there are: none; choose with --json-keys"),
        (
            b'{"body": "a", "id": 1}\n',
            "no key 'text'; the keys there are: 'body', 'id'; choose with --json-keys",
        ),
        (
            b"{" + b", ".join(b'"k%d": 0' % number for number in range(30)) + b"}\n",
            "'k18', 'k19' and 10 more; choose with --json-keys",
        ),
        (b'{"text": null}\n', "key 'text' has null; it must be a string or a list of strings"),
        (b'{"text": 1.5}\n', "key 'text' has a number;"),
        (b'{"text": true}\n', "key 'text' has a boolean;"),
        (b'{"text": {"a": 1}}\n', "key 'text' has an object;"),
        (b'{"text": ["a", null]}\n', "key 'text' has a list with null;"),
    ],
)
def test_bad_lines(bad_line: Callable[..., str], content: bytes, expected: str) -> None:
    assert expected in bad_line(content)


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece", "tiktoken"])
def test_lone_surrogate(bad_line: Callable[..., str], kind: str) -> None:
    message = bad_line(rb'{"text": "ab\ud800c"}', kind=kind)
    assert r"key 'text' has the lone surrogate \ud800 at character 3" in message
    assert "remove it" in message
