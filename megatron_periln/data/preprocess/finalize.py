"""The end of a run: partial datasets get their final names, and what describes them.

A dataset is complete under its final name, or absent; the bytes are those of ``IndexedDatasetBuilder``
(megatron/core/datasets/indexed_dataset.py). The same command with ``--resume`` finds a run that has
finished, and has nothing left to do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_periln.data.indexed.format import BLOCK, DTYPES, HEADER, MAGIC, VERSION
from megatron_periln.data.indexed.index_arrays import IndexArrays
from megatron_periln.data.indexed.sidecar import (
    Sidecar,
    check_counts,
    reference,
    sha256_of,
    sidecar_path,
    utc_now,
)
from megatron_periln.data.output_files import writing
from megatron_periln.data.preprocess.journal import Dataset, Size
from megatron_periln.data.preprocess.partial_outputs import PartialOutputs
from megatron_periln.data.preprocess.plan import Plan, difference, partial_folder, quarantine_file
from megatron_periln.data.readers.documents import BadDocument
from megatron_periln.data.readers.opening import number_lines
from megatron_periln.data.tokenizers.cache import versions as versions_in_use
from megatron_periln.data.tokenizers.encoders import token_dtype
from megatron_periln.errors import PreprocessError
from megatron_periln.files import sync

__all__ = ["check_finished", "finalize_dataset", "finalize_run", "is_finished", "write_index"]


def finalize_run(plan: Plan, outputs: PartialOutputs, checksums: dict[str, str], encoder: str) -> list[Path]:
    """Give every dataset of a complete run its final name, and write what was put in quarantine.

    What was finalized before is left as it is, so that this can be done again after it was cut off.

    Parameters
    ----------
    plan
        What the run was to do.
    outputs
        What it has written.
    checksums
        The SHA-256 of the partial .bin files that are known, by path.
    encoder
        The name of what encoded.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    PreprocessError
        If a file cannot be written.
    """
    files: list[Path] = []
    for dataset, sidecar in _sidecars(plan, outputs, encoder).items():
        key, number = dataset
        prefix = plan.dataset_prefix(key, number if plan.max_bin_size else None)
        stem = outputs.stem(dataset)
        files += finalize_dataset(stem, prefix, outputs.dtype, checksums.get(f"{stem}.bin"), sidecar)
    if plan.max_bin_size:
        _remove_outdated(plan, outputs)
    if plan.on_error == "quarantine" and outputs.records.total().skipped:
        path, partial = quarantine_file(plan.output_prefix), outputs.folder / "quarantine"
        with writing(partial):
            _write_quarantine(partial, number_lines(outputs.bad_documents))
        with writing(path):
            partial.replace(path)
        files.append(path)
    return files


def finalize_dataset(
    stem: str,
    prefix: str,
    dtype: np.dtype,
    bin_sha256: str | None,
    sidecar: Sidecar,
) -> list[Path]:
    """Give a complete dataset its final names, the .idx last: it never stands without its .bin.

    Parameters
    ----------
    stem
        The path of the partial dataset, without suffix.
    prefix
        The final path, without suffix.
    dtype
        The dtype of the tokens.
    bin_sha256
        The SHA-256 of the .bin file, if it is known.
    sidecar
        What the dataset was made of; its ``sha256`` is filled in.

    Raises
    ------
    PreprocessError
        If a file cannot be written.
    """
    bin_, idx, described = Path(prefix + ".bin"), Path(prefix + ".idx"), sidecar_path(prefix)
    partial = Path(stem + ".bin")
    with writing(prefix):
        # All is on the disk under its partial name before the first file of an old dataset goes, and readers
        # find no .idx until the new .bin and sidecar stand. Where this was cut off before, the .bin may have
        # its name already; the rest is made again, from the lengths, which stay.
        sha256 = {
            "bin": bin_sha256 or sha256_of(partial if partial.exists() else bin_),
            "idx": write_index(stem, dtype),
        }
        replace(sidecar, sha256=sha256).write_to(Path(stem + ".json"))
        sync(Path(stem + ".json"))
        for old in (idx, described):
            old.unlink(missing_ok=True)
        if partial.exists():
            partial.replace(bin_)
        Path(stem + ".json").replace(described)
        Path(stem + ".idx").replace(idx)
        sync(idx.parent)
    return [bin_, idx, described]


def write_index(stem: str, dtype: np.dtype) -> str:
    """Write ``{stem}.idx`` from ``{stem}.lengths`` and ``{stem}.documents``; return its SHA-256.

    They are read in blocks, so that memory does not grow with the dataset.

    Parameters
    ----------
    stem
        The path of the partial dataset, without suffix.
    dtype
        The dtype of the tokens.
    """
    sequences = Path(f"{stem}.lengths").stat().st_size // np.dtype(np.int32).itemsize
    documents = Path(f"{stem}.documents").stat().st_size // np.dtype(np.int64).itemsize
    code = next(code for code, known in DTYPES.items() if known == dtype)
    path = Path(f"{stem}.idx")
    with path.open("wb") as idx:
        idx.write(HEADER.pack(MAGIC, VERSION, code, sequences, documents + 1))
        for lengths in _blocks(f"{stem}.lengths", np.int32):
            idx.write(lengths.tobytes())
        offset = 0  # in bytes, of each sequence in the .bin
        for lengths in _blocks(f"{stem}.lengths", np.int32):
            ends = offset + np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
            idx.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes())
            offset = int(ends[-1])
        last = 0  # number of the sequence behind each document
        idx.write(np.zeros(1, np.int64).tobytes())
        for counts in _blocks(f"{stem}.documents", np.int64):
            ends = last + np.cumsum(counts)
            idx.write(ends.tobytes())
            last = int(ends[-1])
    sync(path)
    return sha256_of(path)


def _blocks(path: str, dtype: type[np.generic]) -> Iterator[NDArray[Any]]:
    with Path(path).open("rb") as stream:
        while (block := np.fromfile(stream, dtype, BLOCK)).size:
            yield block


def _remove_outdated(plan: Plan, outputs: PartialOutputs) -> None:
    """Remove the datasets of an earlier run that had more of them."""
    for key, numbers in Counter(key for key, _ in outputs.datasets()).items():
        for number in count(numbers):
            prefix = plan.dataset_prefix(key, number)
            if not Path(f"{prefix}.bin").exists():
                break
            for suffix in (".idx", ".json", ".bin"):
                Path(prefix + suffix).unlink(missing_ok=True)


def _sidecars(plan: Plan, outputs: PartialOutputs, encoder: str) -> dict[Dataset, Sidecar]:
    """Return what describes each dataset, but for its checksums."""
    sizes = outputs.datasets()
    bytes_read, skipped = Counter[Dataset](), {dataset: Counter[str]() for dataset in sizes}
    if plan.max_bin_size:
        chunks = outputs.placed()
    else:  # each has a part of every chunk
        chunks = iter([(outputs.records.total(), dict.fromkeys(sizes, Size(0, 0, 0)))])
    for record, starts in chunks:
        for dataset in starts.keys() & sizes.keys():
            bytes_read[dataset] += record.bytes
            skipped[dataset].update(record.skipped)
    tokenizer = {
        "type": plan.tokenizer_type,
        "digest": plan.tokenizer.digest,
        "vocab_size": plan.tokenizer.vocab_size,
        "eod": plan.tokenizer.eod,
        "encoder": encoder,
    }
    created, versions, parts = utc_now(), versions_in_use(), Counter(key for key, _ in sizes)
    lists: dict[str, Any] = {
        "inputs": [{"path": file.path, "bytes": file.bytes} for file in plan.inputs],
        "command": plan.command,
        "plan": plan.identity(outputs.dtype),
    }
    elsewhere = _listed_in_the_first(plan, lists["plan"])
    return {
        dataset: Sidecar(
            documents=size.documents,
            sequences=size.sequences,
            tokens=size.tokens,
            dtype=str(outputs.dtype),
            bytes_read=bytes_read[dataset],
            skipped=dict(skipped[dataset]),
            tokenizer=tokenizer,
            append_eod=plan.append_eod,
            json_key=dataset[0],
            sha256={},
            versions=versions,
            created=created,
            parts=parts[dataset[0]],
            **(elsewhere[dataset[0]] if dataset[1] else lists),
        )
        for dataset, size in sizes.items()
    }


def _listed_in_the_first(plan: Plan, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the sidecars of a key's further datasets have where the first one's has the lists."""
    nothing: dict[str, Any] = {"inputs": [], "command": [], "plan": {}}
    if not plan.max_bin_size:
        return {}
    firsts = {key: sidecar_path(plan.dataset_prefix(key, 0)) for key in plan.keys}
    return {key: {**nothing, "listed_in": reference(path, identity)} for key, path in firsts.items()}


def _write_quarantine(path: Path, bad: Iterable[BadDocument]) -> None:
    """Write the documents that were skipped as JSON Lines, with what is wrong with each.

    ``content`` is the document as it was read: bytes that are not UTF-8 stand in it as lone
    surrogates, as Python's ``surrogateescape`` writes them. It is null for a document that was too
    large to be read.
    """
    with path.open("w", encoding="utf-8") as stream:
        for document in bad:
            entry = {
                "path": document.place.path,
                "number": document.place.number,
                "byte": document.place.offset,
                "kind": document.kind,
                "reason": document.reason,
                "content": document.content,
            }
            stream.write(json.dumps(entry) + "\n")
        stream.flush()
        sync(path)


def is_finished(output_prefix: str, prefixes: Sequence[str]) -> bool:
    """Whether every dataset stands there with its sidecar, and no run is unfinished."""
    files = [prefix + suffix for prefix in prefixes for suffix in (".bin", ".idx", ".json")]
    return not partial_folder(output_prefix).exists() and all(Path(file).exists() for file in files)


def check_finished(plan: Plan) -> str:
    """Check that a run of ``plan`` wrote every dataset of it; return a line that says so.

    Raises
    ------
    PreprocessError
        If another plan wrote one, or its sidecar does not say which, or is that of another dataset.
    IndexedDatasetError
        If Megatron cannot read one.
    """
    now = plan.identity(token_dtype(plan.tokenizer.vocab_size))
    elsewhere = _listed_in_the_first(plan, now)
    prefixes = [prefix for key in plan.keys for prefix in _finished_prefixes(plan, key)]
    for prefix in prefixes:
        sidecar = Sidecar.read(sidecar_path(prefix))
        changed = difference(sidecar.plan, now) if sidecar.plan else "nothing tells how it was made"
        if sidecar.listed_in:
            same = sidecar.listed_in in [lists["listed_in"] for lists in elsewhere.values()]
            changed = None if same else f"it belongs to another {sidecar.listed_in.get('file')}"
        if not plan.rereadable:
            changed = "a pipe cannot be read again to compare"
        if changed:
            raise PreprocessError(
                f"{prefix}.bin exists, and not by this command: {changed}; "
                f"choose another --output-prefix or pass --overwrite"
            )
        check_counts(sidecar, IndexArrays.open(prefix, may_be_empty=plan.shard[1] > 1))
    return f"Nothing to do: the run has finished before: {' '.join(prefixes)}"


def _finished_prefixes(plan: Plan, key: str) -> list[str]:
    if not plan.max_bin_size:
        return [plan.dataset_prefix(key)]
    parts = Sidecar.read(sidecar_path(plan.dataset_prefix(key, 0))).parts
    return [plan.dataset_prefix(key, number) for number in range(parts)]
