"""What a preprocessing run shall do, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_periln.data.output_files import prepare_output
from megatron_periln.data.readers.inputs import InputFile
from megatron_periln.data.tokenizers.resolved_tokenizer import ResolvedTokenizer

__all__ = [
    "CHUNK_BYTES",
    "MOST_DOCUMENT_BYTES",
    "Plan",
    "Summary",
    "dataset_prefix",
    "difference",
    "partial_folder",
    "prepare_outputs",
    "quarantine_file",
]

CHUNK_BYTES = 4 << 20
"""Size of the parts in which the input is read, where a plan does not say; looked up for each plan."""

MOST_DOCUMENT_BYTES = 256 << 20
"""Size of the largest document to read, where nothing else is asked for."""

_FEW = 4
"""Input files that an error lists; of more it names one."""


@dataclass(frozen=True)
class Plan:
    """What to encode, how, and where to.

    Parameters
    ----------
    inputs
        The input files, in order.
    output_prefix
        The datasets are ``{output_prefix}_{key}_document``, or ``_sentence``.
    tokenizer, tokenizer_type
        The tokenizer, and its name among Megatron's.
    keys
        The JSON keys to encode, a dataset for each.
    append_eod
        End each document that is not empty with the end-of-document token.
    split, split_name
        Splits a text into sentences; and what that is, for people.
    encoder
        The name of the encoder to use; None for the fastest that is exact.
    workers
        Number of worker processes.
    partitions
        The order of the documents: see ``to_tasks``.
    shard
        Which part of the input to encode, from 0, and of how many.
    max_bin_size
        Bytes after which a dataset goes on in another; None for no limit.
    max_document_bytes
        Size of the largest document to read.
    any_size
        Encode texts whatever memory they take.
    on_error
        ``stop``, ``skip`` or ``quarantine`` documents that cannot be encoded.
    resume, overwrite
        Resume an unfinished run; replace datasets that exist.
    command
        The command line, for the sidecar.
    chunk_bytes
        Size of the parts in which the input is read.
    """

    inputs: list[InputFile]
    output_prefix: str
    tokenizer: ResolvedTokenizer
    tokenizer_type: str
    keys: list[str]
    append_eod: bool = False
    split: Callable[[str], list[str]] | None = None
    split_name: str | None = None
    encoder: str | None = None
    workers: int = 1
    partitions: int = 1
    shard: tuple[int, int] = (0, 1)
    max_bin_size: int | None = None
    max_document_bytes: int = MOST_DOCUMENT_BYTES
    any_size: bool = False
    on_error: str = "stop"
    resume: bool = False
    overwrite: bool = False
    command: list[str] = field(default_factory=list)
    chunk_bytes: int = field(default_factory=lambda: CHUNK_BYTES)

    @property
    def rereadable(self) -> bool:
        """Whether the inputs can be read again: none is a pipe."""
        return all(file.regular for file in self.inputs)

    def dataset_prefix(self, key: str, number: int | None = None) -> str:
        """Return the path, without suffix, of the dataset of a key, or of one of its numbered datasets."""
        return dataset_prefix(self.output_prefix, key, sentences=self.split is not None, number=number)

    @cached_property
    def _described_inputs(self) -> list[list[Any]]:
        return [[file.path, file.format, file.bytes, file.modified] for file in self.inputs]

    def identity(self, dtype: np.dtype) -> dict[str, Any]:
        """Return what decides the bytes of the output, by the name that errors give it."""
        return {
            "the input": self._described_inputs,
            "--json-keys": self.keys,
            "--append-eod": self.append_eod,
            "--split-sentences": self.split_name,
            "the tokenizer": self.tokenizer.digest,
            "the dtype": str(dtype),
            "--partitions": self.partitions,
            "--shard": list(self.shard),
            "--max-bin-size": self.max_bin_size,
            # The default given as a flag is another: it takes texts that their encoder would be limited for.
            "--max-document-bytes": (
                f"{self.max_document_bytes}, for any encoder"
                if self.any_size and self.max_document_bytes == MOST_DOCUMENT_BYTES
                else self.max_document_bytes
            ),
            "the size of a chunk": self.chunk_bytes,
        }


@dataclass(frozen=True)
class Summary:
    """What a run read and wrote.

    Parameters
    ----------
    documents
        Number of documents written.
    tokens
        Number of tokens written, over all keys.
    bytes
        Size of the documents read, decompressed.
    empty
        Number of documents without tokens, over all keys.
    skipped
        Number of documents that were skipped, for each reason.
    encoder
        What encoded them.
    seconds
        Wall time.
    files
        The files written.
    """

    documents: int
    tokens: int
    bytes: int
    empty: int
    skipped: dict[str, int]
    encoder: str
    seconds: float
    files: list[Path]

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9) / 1e6
        empty = f" ({self.empty} empty)" if self.empty else ""
        reasons = ", ".join(f"{number} {kind}" for kind, number in sorted(self.skipped.items()))
        skipped = f"Skipped {sum(self.skipped.values())} documents: {reasons}\n" if reasons else ""
        return (
            f"{skipped}Wrote {self.documents} documents{empty}, {self.tokens} tokens, "
            f"from {self.bytes} bytes in {self.seconds:.1f} s ({rate:.1f} MB/s, {self.encoder}): "
            f"{' '.join(map(str, self.files))}"
        )


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return the first thing that decides the bytes and is not as it was, given two identities of plans.

    Parameters
    ----------
    before
        As it was read from JSON.
    now
        As ``Plan.identity`` returns it.
    """
    for name, value in json.loads(json.dumps(now)).items():
        there = before.get(name)
        if there != value:
            if name == "the input" and isinstance(there, list) and max(len(there), len(value)) > _FEW:
                return _difference_of_files(there, value)
            return f"{name} was {there!r} and is {value!r}"
    return None


def _difference_of_files(before: list[Any], now: list[Any]) -> str:
    if len(before) != len(now):
        return f"the input had {len(before)} files and has {len(now)}"
    at = next(at for at, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
    return f"the input's file {at + 1} was {before[at]!r} and is {now[at]!r}"


def dataset_prefix(prefix: str, key: str, *, sentences: bool = False, number: int | None = None) -> str:
    """Return the prefix of a dataset: ``{prefix}_{key}_document``, or ``_sentence``.

    Where datasets have a size limit, they are numbered: ``..._document_00000``.
    """
    name = f"{prefix}_{key}_{'sentence' if sentences else 'document'}"
    return name if number is None else f"{name}_{number:05d}"


def prepare_outputs(
    output_prefix: str, prefixes: Iterable[str], *, quarantine: bool, resume: bool, overwrite: bool
) -> None:
    """Make the output folders, and check that the datasets can be written.

    Raises
    ------
    PreprocessError
        If a folder cannot be made or written to, or if an output exists that shall not be replaced.
    """
    # A run that is resumed may have finalized some of its datasets.
    resumes = resume and partial_folder(output_prefix).exists()
    files = [prefix + suffix for prefix in prefixes for suffix in (".bin", ".idx")]
    if quarantine:
        files.append(str(quarantine_file(output_prefix)))
    for file in files:
        prepare_output(file, flag="--output-prefix", overwrite=overwrite or resumes)


def quarantine_file(output_prefix: str) -> Path:
    """Return the file that skipped documents go to."""
    return Path(f"{output_prefix}_quarantine.jsonl")


def partial_folder(output_prefix: str) -> Path:
    """Return the folder in which a run keeps what it has done."""
    return Path(f"{output_prefix}.partial")
