"""Merging of indexed datasets, with the bytes of Megatron's ``IndexedDatasetBuilder.add_index``.

Source: ``IndexedDatasetBuilder`` (megatron/core/datasets/indexed_dataset.py) and tools/merge_datasets.py
of Megatron-LM. Memory does not grow with the datasets.
"""

from __future__ import annotations

import errno
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_periln.data.indexed.format import (
    DTYPES,
    HEADER,
    MAGIC,
    VERSION,
    IndexedDatasetInfo,
    blocks,
    without_suffix,
)
from megatron_periln.data.indexed.index_arrays import IndexArrays, check_layout
from megatron_periln.data.indexed.sidecar import (
    FORMAT_VERSION,
    Sidecar,
    check_counts,
    is_sidecar,
    reference,
    sha256_of,
    sidecar_path,
    utc_now,
)
from megatron_periln.data.input_order import in_order
from megatron_periln.data.output_files import prepare_output, writing
from megatron_periln.errors import PreprocessError
from megatron_periln.files import replacing

__all__ = ["Merged", "append_file", "find_datasets", "merge_datasets", "merge_sidecars"]

COPY_BLOCK = 1 << 23
"""Bytes copied at a time where the kernel cannot copy."""
_BESIDE = "copy that of its own run there, or remove the sidecars"
_CANNOT_COPY_RANGE = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


@dataclass(frozen=True)
class Merged:
    """What a merge wrote.

    Parameters
    ----------
    info
        Dtype and counts of the dataset.
    datasets
        Number of datasets merged.
    files
        The files written.
    """

    info: IndexedDatasetInfo
    datasets: int
    files: list[Path]

    def __str__(self) -> str:
        return (
            f"Merged {self.datasets} datasets, {self.info.documents} documents, {self.info.sequences} "
            f"sequences, {self.info.tokens} tokens ({self.info.dtype}): {' '.join(map(str, self.files))}"
        )


def find_datasets(
    inputs: Sequence[str], order: str = "natural", differs: Callable[[str, str], None] = lambda *_: None
) -> list[str]:
    """Return the prefixes of the datasets that the command line names.

    Parameters
    ----------
    inputs
        Prefixes, with or without .bin or .idx; globs of prefixes; folders.
    order
        That of the datasets of a glob or a folder, one of ``ORDERS``: natural is ``part_2`` before
        ``part_10``, bytes is Megatron's.
    differs
        Is called with two datasets that the other order has the other way round, if there are any.

    Raises
    ------
    PreprocessError
        If a folder holds no dataset, a glob matches none, or a dataset is named twice.
    """
    prefixes: list[str] = []
    for name in inputs:
        if Path(name).is_dir():
            found = _datasets_among(Path(name).iterdir(), order, differs)
            if not found:
                raise PreprocessError(f"{name}: no .bin and .idx files in this folder")
        elif not glob.has_magic(name) or any(Path(name + suffix).exists() for suffix in ("", ".idx")):
            found = [without_suffix(name)]
        else:
            matches = glob.glob(f"{without_suffix(name)}.idx") + glob.glob(f"{without_suffix(name)}.bin")  # noqa: PTH207
            found = _datasets_among(map(Path, matches), order, differs)
            if not found:
                raise PreprocessError(f"{name}: no dataset matches this glob")
        prefixes.extend(found)
    seen: set[Path] = set()
    for prefix in prefixes:
        path = Path(f"{prefix}.idx").resolve()
        if path in seen:
            raise PreprocessError(f"{prefix}: given twice; name each dataset once, and quote globs")
        seen.add(path)
    return prefixes


def merge_datasets(
    prefixes: Sequence[str],
    output_prefix: str,
    *,
    overwrite: bool = False,
    multimodal: bool = False,
    command: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> Merged:
    """Merge the datasets at ``prefixes``, in that order, into one at ``output_prefix``.

    All inputs are checked first; the dataset appears when it is complete. If each input has a sidecar,
    so has the output.

    Parameters
    ----------
    prefixes
        The datasets.
    output_prefix
        Writes ``{output_prefix}.bin`` and ``.idx``.
    overwrite
        Replace a dataset that exists.
    multimodal
        Insist that the datasets have modes. They are merged where there are any.
    command
        The command, for the sidecar.
    progress
        Is called with a line for each dataset.

    Raises
    ------
    PreprocessError
        If the output cannot be written, exists, or is an input, or if the inputs do not fit each other.
    IndexedDatasetError
        If an input is damaged.
    """
    if not prefixes:
        raise PreprocessError("no datasets to merge: name at least one")
    _refuse_output_among(prefixes, output_prefix)
    bin_, json_, idx = (Path(output_prefix + suffix) for suffix in (".bin", ".json", ".idx"))
    for path in (bin_, idx):
        prepare_output(path, flag="--output-prefix", overwrite=overwrite)
    datasets = []
    for prefix in prefixes:
        datasets.append(IndexArrays.open(prefix, may_be_empty=True))
        check_layout(datasets[-1])
    _check_fit(datasets, multimodal=multimodal)
    if not _sum(datasets).tokens:
        raise PreprocessError(
            f"{output_prefix}: no dataset to be merged has tokens; preprocess a corpus that is not empty"
        )
    sidecar = merge_sidecars(datasets, command)

    stale = _stale_sidecar(json_, sidecar, overwrite=overwrite)
    files = [bin_, idx] if sidecar is None else [bin_, json_, idx]
    with writing(bin_, "; nothing was left there"), replacing(*files, stale=stale) as temporary:
        with temporary[0].open("wb", buffering=0) as stream:
            for number, dataset in enumerate(datasets, start=1):
                append_file(dataset.bin, stream)
                progress(f"Copied {number} of {len(datasets)} datasets: {dataset.prefix}")
        with temporary[-1].open("wb") as stream:
            _write_index(datasets, stream)
        if sidecar is not None:
            checksums = {"bin": sha256_of(temporary[0]), "idx": sha256_of(temporary[-1])}
            replace(sidecar, sha256=checksums).write_to(temporary[1])
    return Merged(info=_sum(datasets), datasets=len(datasets), files=files)


def merge_sidecars(datasets: Sequence[IndexArrays], command: Sequence[str]) -> Sidecar | None:
    """Return the sidecar of the datasets merged, without checksums; None if one of them has none.

    Raises
    ------
    PreprocessError
        If a sidecar is not that of its dataset, or the datasets were tokenized in different ways.
    """
    paths = [sidecar_path(dataset.prefix) for dataset in datasets]
    sidecars = []
    inputs = _Inputs()
    for path, dataset in zip(paths, datasets, strict=True):
        if path.exists():
            sidecar = Sidecar.read(path)
            check_counts(sidecar, dataset)
            inputs.add(path, sidecar)
            # Parts of one run written by earlier versions all list all inputs: held once, not once a part.
            sidecars.append(replace(sidecar, inputs=[], plan={}))
    first_path = next((path for path in paths if path.exists()), None)
    for path, sidecar in zip((path for path in paths if path.exists()), sidecars, strict=True):
        for what, here, there in (
            ("tokenizer", _identity(sidecars[0]), _identity(sidecar)),
            ("append_eod", sidecars[0].append_eod, sidecar.append_eod),
        ):
            if here != there:
                raise PreprocessError(
                    f"{path}: {what} is {there}, but {here} in {first_path}: "
                    f"preprocess all datasets with the same tokenizer flags"
                )
    if len(sidecars) < len(datasets):
        return None
    skipped: Counter[str] = Counter()
    for sidecar in sidecars:
        skipped.update(sidecar.skipped)
    packages = dict.fromkeys(name for sidecar in sidecars for name in sidecar.versions)
    return replace(
        sidecars[0],
        documents=sum(sidecar.documents for sidecar in sidecars),
        sequences=sum(sidecar.sequences for sidecar in sidecars),
        tokens=sum(sidecar.tokens for sidecar in sidecars),
        bytes_read=sum(sidecar.bytes_read for sidecar in sidecars),
        skipped=dict(skipped),
        json_key=_join(sidecar.json_key for sidecar in sidecars),
        inputs=inputs.of_all(),
        sha256={},
        versions={
            name: _join(sidecar.versions[name] for sidecar in sidecars if name in sidecar.versions)
            for name in packages
        },
        command=list(command),
        created=utc_now(),
        format_version=FORMAT_VERSION,
        plan={},
        parts=1,
        listed_in={},
    )


class _Inputs:
    """The inputs of several datasets; what lists them for others is read once."""

    def __init__(self) -> None:
        self._by_path: dict[str, dict[str, Any]] = {}
        self._read: dict[Path, dict[str, str]] = {}

    def of_all(self) -> list[dict[str, Any]]:
        return list(self._by_path.values())

    def add(self, path: Path, sidecar: Sidecar) -> None:
        if not sidecar.listed_in:
            self._list(path, sidecar)
            return
        other = path.parent / sidecar.listed_in["file"]
        try:
            if other not in self._read:
                self._list(other, Sidecar.read(other))
        except PreprocessError as error:
            raise PreprocessError(
                f"{path}: its inputs are listed in another sidecar: {error}; {_BESIDE}"
            ) from error
        if self._read.get(other) != sidecar.listed_in:
            raise PreprocessError(
                f"{path}: its inputs are listed in {other.name}, and there is another run's; {_BESIDE}"
            )

    def _list(self, path: Path, sidecar: Sidecar) -> None:
        self._by_path.update((item["path"], item) for item in sidecar.inputs)
        if sidecar.parts > 1:
            self._read[path] = reference(path, sidecar.plan)


def append_file(source: Path, target: BinaryIO) -> None:
    """Append the file ``source`` to ``target``, which is open without a buffer.

    Raises
    ------
    PreprocessError
        If the source becomes shorter meanwhile.
    """
    with source.open("rb", buffering=0) as stream:
        remaining = os.fstat(stream.fileno()).st_size
        while remaining and (copied := _copy_range(stream, target, remaining)):
            remaining -= copied
        while remaining:
            block = stream.read(min(COPY_BLOCK, remaining))
            if not block:
                raise PreprocessError(f"{source}: became shorter while it was read: merge again")
            remaining -= len(block)
            view = memoryview(block)
            while view:
                view = view[target.write(view) :]


def _datasets_among(paths: Iterable[Path], order: str, differs: Callable[[str, str], None]) -> list[str]:
    found = {str(path.with_suffix("")) for path in paths if path.suffix in (".bin", ".idx")}
    return in_order(found, order, name=lambda prefix: (prefix,), differs=differs)


def _refuse_output_among(prefixes: Sequence[str], output_prefix: str) -> None:
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            source, output = Path(prefix + suffix), Path(output_prefix + suffix)
            if source.exists() and output.exists() and source.samefile(output):
                raise PreprocessError(
                    f"{output}: is the output and an input ({source}): choose another --output-prefix"
                )


def _stale_sidecar(path: Path, new: Sidecar | None, *, overwrite: bool) -> list[Path]:
    """Return the file at ``path`` if it is to be removed; a corpus of that name is left alone."""
    if not path.exists() or (new is None and not is_sidecar(path)):
        return []
    prepare_output(path, flag="--output-prefix", overwrite=overwrite)
    if not is_sidecar(path):
        raise PreprocessError(f"{path} exists and is no sidecar of a dataset: choose another --output-prefix")
    return [path]


def _check_fit(datasets: Sequence[IndexArrays], *, multimodal: bool) -> None:
    """Check that all datasets have one dtype, and that all or none have modes."""
    by_dtype: dict[str, list[str]] = {}
    for dataset in datasets:
        by_dtype.setdefault(dataset.info.dtype.name, []).append(dataset.prefix)
    if len(by_dtype) > 1:
        names = "; ".join(f"{dtype}: {', '.join(those)}" for dtype, those in by_dtype.items())
        raise PreprocessError(
            f"the datasets have tokens of different dtypes ({names}): preprocess all with the same tokenizer"
        )
    without = [dataset.prefix for dataset in datasets if dataset.modes is None]
    if without and (multimodal or len(without) < len(datasets)):
        others = "--multimodal was given" if multimodal else "other datasets have them"
        raise PreprocessError(f"{without[0]}: has no modes, but {others}: merge datasets of one kind")


def _sum(datasets: Sequence[IndexArrays]) -> IndexedDatasetInfo:
    return IndexedDatasetInfo(
        dtype=datasets[0].info.dtype,
        sequences=sum(dataset.info.sequences for dataset in datasets),
        documents=sum(dataset.info.documents for dataset in datasets),
        tokens=sum(dataset.info.tokens for dataset in datasets),
    )


def _write_index(datasets: Sequence[IndexArrays], stream: BinaryIO) -> None:
    info = _sum(datasets)
    code = next(code for code, dtype in DTYPES.items() if dtype == info.dtype)
    stream.write(HEADER.pack(MAGIC, VERSION, code, info.sequences, info.documents + 1))
    for dataset in datasets:
        for block in blocks(dataset.lengths):
            stream.write(block.tobytes())
    offset = 0
    for dataset in datasets:
        for pointers in blocks(dataset.pointers):
            stream.write((pointers + offset).tobytes())
        offset += dataset.info.tokens * info.dtype.itemsize
    stream.write(np.zeros(1, dtype=np.int64).tobytes())
    offset = 0
    for dataset in datasets:
        for ends in blocks(dataset.document_ends[1:]):
            stream.write((ends + offset).tobytes())
        offset += dataset.info.sequences
    for dataset in datasets:
        for modes in blocks(dataset.modes) if dataset.modes is not None else ():
            stream.write(modes.tobytes())


def _copy_range(source: BinaryIO, target: BinaryIO, most: int) -> int:
    """Return the number of bytes copied; 0 where the kernel cannot, or at the end of the source."""
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), most)
    except OSError as error:
        if error.errno not in _CANNOT_COPY_RANGE:
            raise
        return 0


def _identity(sidecar: Sidecar) -> tuple[object, ...]:
    """Return what two tokenizers must share to give the same ids, whatever runs them."""
    return tuple(sidecar.tokenizer[name] for name in ("type", "digest", "vocab_size", "eod"))


def _join(values: Iterable[str]) -> str:
    return ",".join(dict.fromkeys(values))
