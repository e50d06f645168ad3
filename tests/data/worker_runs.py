"""Worker processes on chunks of a text each, without the tool around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_periln.data.preprocess.checker import Checker
from megatron_periln.data.preprocess.encode import ChunkEncoder
from megatron_periln.data.preprocess.journal import Placer
from megatron_periln.data.preprocess.partial_outputs import Location
from megatron_periln.data.preprocess.workers import Report, Written, encode_and_write
from megatron_periln.data.readers.sources import Block
from megatron_periln.data.readers.tasks import Task
from megatron_periln.data.tokenizers.encoders import BatchEncoder, GuardedEncoder, choose_encoder
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
        self,
        act: Callable[[str], None],
        tasks: Iterable[Task],
        *,
        workers: int = 2,
        stop: bool = True,
        checker: Checker | None = None,
        guarded: Callable[[BatchEncoder], GuardedEncoder] | None = None,
    ) -> Iterator[Written]:
        encoder = choose_encoder(wrap_tokenizer(Characters(act))).encoder
        guard = guarded(encoder) if guarded else None
        chunks = ChunkEncoder(
            guard or encoder, ["text"], UINT16, guarded=guard, sampled=checker is not None, stop=stop
        )
        if checker:
            checker.warn = self.notes.append
        placer = Placer(UINT16)

        def place(report: Report) -> dict[str, Location]:
            self.placed += 1
            self.before_place(report)
            return {"text": Location(self.stem, placer.place(report.sizes)["text", 0])}

        return encode_and_write(chunks, tasks, place, workers, checker=checker, warn=self.notes.append)

    def before_place(self, report: Report) -> None:
        """Look at what is to be placed."""

    def text(self) -> str:
        return "".join(map(chr, np.fromfile(self.stem + ".bin", UINT16)))


def blocks(texts: Iterable[str]) -> Iterator[Task]:
    """Yield a chunk for each text."""
    for n, text in enumerate(texts):
        yield Task(Block("file", n, n + 1, to_lines([text]), 1))
