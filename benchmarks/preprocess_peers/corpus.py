"""Real text found on the machine, as JSON Lines."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Corpus", "build_corpus", "default_roots", "describe", "documents", "split_corpus"]

PIECE = 100_000
"""Characters of a document at most; longer files are cut at line ends."""

_LARGEST_FILE = 2_000_000
_LONGEST_LINES = 1000  # characters a line on average: more is packed data, not prose or code
_CODE = (
    "py",
    "pyi",
    "c",
    "cc",
    "cpp",
    "cu",
    "cuh",
    "h",
    "hpp",
    "java",
    "js",
    "ts",
    "pl",
    "pm",
    "rb",
    "rs",
    "go",
)
_PROSE = ("md", "rst", "txt", "html", "tex", "debian", *"12345678")  # the digits are manual pages
_SUFFIXES = frozenset(f".{suffix}" for suffix in (*_CODE, *_PROSE))


@dataclass(frozen=True)
class Corpus:
    """A corpus and what it was made of.

    Parameters
    ----------
    path
        The JSON Lines file.
    bytes, documents
        Its size.
    sha256
        Of the file.
    """

    path: Path
    bytes: int
    documents: int
    sha256: str


def default_roots() -> list[Path]:
    """Return the folders of Python's own sources and of the system's documentation and libraries."""
    paths = sysconfig.get_paths()
    named = [paths["stdlib"], paths["purelib"], "/usr/share", "/usr/lib", "/usr/include", "/usr/local"]
    return [Path(path) for path in dict.fromkeys(named)]


def build_corpus(path: Path, roots: Iterable[Path], megabytes: float) -> None:
    """Write ``megabytes`` of distinct text found under ``roots``, or all there is if that is less.

    Files come in the order of a hash of their paths, which mixes prose and code, and the same
    machine gives the same corpus.
    """
    size, seen = 0, set[bytes]()
    files = sorted(_files(roots), key=lambda name: hashlib.sha256(name.encode()).digest())
    pieces = (piece for file in files for piece in _pieces(_read(Path(file))))
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        for piece in pieces:
            digest = hashlib.sha256(piece.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            size += stream.write(json.dumps({"text": piece}, ensure_ascii=False).encode() + b"\n")
            if size >= megabytes * 1e6:
                break
    partial.replace(path)


def describe(path: Path) -> Corpus:
    """Measure the corpus, which also brings it into the page cache."""
    digest, size, lines = hashlib.sha256(), 0, 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
            lines += block.count(b"\n")
    return Corpus(path, size, lines, digest.hexdigest())


def documents(path: Path, characters: int) -> Iterator[str]:
    """Yield the first documents of a corpus, ``characters`` in all."""
    with path.open(encoding="utf-8", newline="\n") as stream:
        for line in stream:
            text = json.loads(line)["text"]
            yield text
            characters -= len(text)
            if characters <= 0:
                return


def split_corpus(path: Path, folder: Path, parts: int, megabytes: float) -> int:
    """Write the first ``megabytes`` as ``parts`` files for tools that read a file a worker.

    Returns
    -------
    int
        The bytes of the corpus's lines that the parts hold; each also has an ``id``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = 0
    streams = [(folder / f"{part}.jsonl").open("wb") for part in range(parts)]
    with path.open("rb") as source:
        for number, line in enumerate(source):
            if taken + len(line) > megabytes * 1e6:
                break
            taken += len(line)
            streams[number % parts].write(b'{"id": "%d", ' % number + line[1:])
    for stream in streams:
        stream.close()
    return taken


def _files(roots: Iterable[Path]) -> Iterator[str]:
    known = set[str]()
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
                plain = suffix in _SUFFIXES or (path.suffix == ".gz" and suffix == "")
                if plain and str(path) not in known and path.is_file() and not path.is_symlink():
                    known.add(str(path))
                    yield str(path)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return ""
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        text = content.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return ""
    packed = len(text) > _LONGEST_LINES * (text.count("\n") + 1)
    return "" if "\0" in text or packed else text


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        if not text[start:end].isspace():
            yield text[start:end]
        start = end
