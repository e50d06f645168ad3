"""What tests of preprocessing share: documents, what Megatron makes of them, and what a folder holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.data.characters import Characters

TEXTS = ["one", "", "two two", "x" * 70, "three, and so on", "é", "", "the last but one", "the last"]
"""Some documents, some of them empty."""


def to_lines(texts: Iterable[str | list[str]], key: str = "text") -> bytes:
    """Return JSON Lines."""
    return b"".join(json.dumps({key: text}).encode() + b"\n" for text in texts)


def read(prefix: Path | str) -> tuple[bytes, bytes]:
    """Return the bytes of a dataset."""
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def by_megatron(prefix: Path, texts: Sequence[str | list[str]], *, eod: bool = False) -> tuple[bytes, bytes]:
    """Return the bytes of the dataset that Megatron's builder writes, with a token for each character."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(Characters.vocab_size))
    for text in texts:
        sentences = [text] if isinstance(text, str) else text
        sequences = [[ord(character) for character in sentence] for sentence in sentences if sentence]
        if eod and sequences:
            sequences[-1].append(Characters.eod)
        builder.add_document([token for ids in sequences for token in ids], [len(ids) for ids in sequences])
    builder.finalize(f"{prefix}.idx")
    return read(prefix)


def names(folder: Path) -> list[str]:
    """Return the names in a folder that begin with out: all that a run writes there."""
    return sorted(path.name for path in folder.glob("out*"))


FILES = ["out_text_document.bin", "out_text_document.idx", "out_text_document.json"]
"""What a finished run leaves."""
