"""Worker processes on chunks of a text each, without the tool around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_periln.data.preprocess.encode import ChunkEncoder
from megatron_periln.data.preprocess.journal import Placer
from megatron_periln.data.preprocess.partial_outputs import Location
from megatron_periln.data.preprocess.workers import Report, Written, encode_and_write
from megatron_periln.data.readers.sources import Block
from megatron_periln.data.readers.tasks import Task
from megatron_periln.data.tokenizers.encoders import choose_encoder
from megatron_periln.data.tokenizers.resolve import wrap_tokenizer
from tests.data.characters import Characters
from tests.data.preprocessing import to_lines

UINT16 = np.dtype(np.uint16)
Started = Callable[[], list[int]]
"""Lists the processes that a test has started."""


class Run:
    """Runs workers on chunks; keeps what they were told and what they wrote."""

    def __init__(self, folder: Path) -> None:
        self.stem = str(folder / "partial")
        self.notes: list[str] = []
        self.placed = 0

    def __call__(
        self, act: Callable[[str], None], tasks: Iterable[Task], *, workers: int = 2, stop: bool = True
    ) -> Iterator[Written]:
        encoder = choose_encoder(wrap_tokenizer(Characters(act))).encoder
        chunks = ChunkEncoder(encoder, ["text"], UINT16, stop=stop)
        placer = Placer(UINT16)

        def place(report: Report) -> dict[str, Location]:
            self.placed += 1
            return {"text": Location(self.stem, placer.place(report.sizes)["text", 0])}

        return encode_and_write(chunks, tasks, place, workers, warn=self.notes.append)

    def text(self) -> str:
        return "".join(map(chr, np.fromfile(self.stem + ".bin", UINT16)))


def blocks(texts: Iterable[str]) -> Iterator[Task]:
    """Yield a chunk for each text."""
    for n, text in enumerate(texts):
        yield Task(Block("file", n, n + 1, to_lines([text]), 1))
