"""The driver: input files through worker processes into indexed datasets."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from megatron_periln.data.documents import chunk_lines, lines_in_output_order
from megatron_periln.data.encode import Encoder
from megatron_periln.data.errors import PreprocessError
from megatron_periln.data.workers import encode_in_order
from megatron_periln.data.writer import open_writers

__all__ = ["Summary", "output_prefixes", "prepare_outputs", "preprocess"]

_CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True)
class Summary:
    """What a run read and wrote.

    Parameters
    ----------
    documents
        Number of documents read.
    tokens
        Number of tokens written, over all keys.
    bytes
        Size of the documents read, decompressed.
    seconds
        Wall time.
    files
        The files written.
    """

    documents: int
    tokens: int
    bytes: int
    seconds: float
    files: list[Path]

    def __str__(self) -> str:
        return (
            f"Wrote {self.documents} documents, {self.tokens} tokens, from {self.bytes} bytes "
            f"in {self.seconds:.1f} s: {' '.join(map(str, self.files))}"
        )


def output_prefixes(prefix: str, keys: Iterable[str], *, split_sentences: bool = False) -> dict[str, str]:
    """Return the dataset prefix for each key: ``{prefix}_{key}_document`` or ``..._sentence``."""
    level = "sentence" if split_sentences else "document"
    return {key: f"{prefix}_{key}_{level}" for key in keys}


def prepare_outputs(prefixes: Iterable[str], *, overwrite: bool = False) -> None:
    """Make the output folders, and check that the datasets can be written.

    Raises
    ------
    PreprocessError
        If a folder cannot be made or written to, or if an output exists and ``overwrite`` is False.
    """
    for prefix in prefixes:
        folder = Path(prefix).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PreprocessError(
                f"--output-prefix: cannot make the folder {folder}: {error.strerror}"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PreprocessError(f"--output-prefix: the folder {folder} is not writable")
        for path in (Path(prefix + ".bin"), Path(prefix + ".idx")):
            if path.exists() and not overwrite:
                raise PreprocessError(f"{path} exists: choose another --output-prefix or pass --overwrite")


def preprocess(
    inputs: Sequence[Path],
    encoder: Encoder,
    prefixes: dict[str, str],
    *,
    workers: int,
    partitions: int = 1,
    keep_sequential_samples: bool = False,
    log_interval: int = 1000,
) -> Summary:
    """Encode the documents of ``inputs`` into one indexed dataset for each key.

    Progress goes to stderr. The datasets appear when all are complete; a run that fails leaves none.

    Parameters
    ----------
    inputs
        JSON Lines files, plain or ``.gz``.
    encoder
        Parses and tokenizes.
    prefixes
        The dataset prefix for each of the encoder's keys.
    workers
        Number of worker processes.
    partitions, keep_sequential_samples
        The order of the documents: see ``lines_in_output_order``.
    log_interval
        Number of documents between two lines of progress.

    Raises
    ------
    PreprocessError
        If the input is empty, cannot be read or encoded, a worker dies, or an output cannot be written.
    """
    started = time.monotonic()
    documents = bytes_read = 0
    lines = lines_in_output_order(inputs, partitions, keep_sequential_samples=keep_sequential_samples)
    encoded = encode_in_order(encoder, chunk_lines(lines, _CHUNK_BYTES), workers)
    with open_writers([prefixes[key] for key in encoder.keys], encoder.dtype) as writers, closing(encoded):
        for chunk in encoded:
            for key, writer in zip(encoder.keys, writers, strict=True):
                writer.add(chunk.documents[key])
            logged = documents // log_interval
            documents += chunk.lines
            bytes_read += chunk.bytes
            if documents // log_interval > logged:
                seconds = time.monotonic() - started
                print(
                    f"Processed {documents} documents ({documents / seconds:.1f} docs/s, "
                    f"{bytes_read / seconds / 1024**2:.2f} MB/s).",
                    file=sys.stderr,
                )
        if documents == 0:
            raise PreprocessError(f"no documents: {' '.join(map(str, inputs))} is empty")
    return Summary(
        documents=documents,
        tokens=sum(writer.tokens for writer in writers),
        bytes=bytes_read,
        seconds=time.monotonic() - started,
        files=[path for writer in writers for path in writer.files],
    )
