"""Safetensors files with an index, written and read a part at a time."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_periln.errors import UsageError

__all__ = [
    "INDEX",
    "Layout",
    "Part",
    "Tensors",
    "dtype_name",
    "finalize_shards",
    "is_finite",
    "write_tensors",
]

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ROWS = 1 << 14  # of tables that are compared at a time


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as ``--dtype`` and config.json have it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity."""
    return all(bool(part.isfinite().all()) for part in (tensor.split(_ROWS) if tensor.dim() else [tensor]))


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> int:
    """Write tensors as they come, and return their number of bytes.

    Holds as many at a time as go into one file.

    Parameters
    ----------
    folder
        Where the files go, and their index if they are several.
    tensors
        Names and values.
    shard_bytes
        A file holds at most so many bytes, or one tensor.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total = 0
    mode = _new_file_mode()  # save_file lets nobody else read

    def flush() -> None:
        nonlocal pending_bytes
        if pending:
            part = folder / f"{len(shards)}.part"
            save_file(pending, part, metadata={"format": "pt"})
            part.chmod(mode)
            shards.append(list(pending))
            pending.clear()
            pending_bytes = 0

    for name, tensor in tensors:
        if pending_bytes + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
        del tensor  # not to be held while the next one is made
    flush()
    finalize_shards(folder, shards, total)
    return total


def _new_file_mode() -> int:
    umask = os.umask(0o077)  # read by setting it, there is no other way
    os.umask(umask)
    return 0o666 & ~umask


def finalize_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the files of `write_tensors` their names, which have the number of files in them, and an index.

    Parameters
    ----------
    folder
        Holds the files, as ``0.part`` and so on.
    shards
        The names of each file's tensors.
    total
        Bytes of all tensors.
    """
    if len(shards) == 1:
        (folder / "0.part").rename(folder / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _files_of(index: Path) -> set[str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return set(weight_map.values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is no index of safetensors files; download it again") from error


class Layout(NamedTuple):
    """What a safetensors file says of a tensor; its dtype by its name there, such as ``BF16``."""

    dtype: str
    shape: list[int]


class Part(NamedTuple):
    """What a name stands for: a stored tensor, or rows of one of the matrices that it holds."""

    stored: str
    matrix: int | None = None
    rows: slice = slice(None)


class Tensors:
    """The tensors of a folder of safetensors files, each read when asked for.

    Where one file and an index of several are there, the file is read, as transformers does.

    Raises
    ------
    UsageError
        If there are none, or their index names a file that is not there, or one can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if (folder / _SINGLE).is_file():
            files = {_SINGLE}
        elif index.is_file():
            files = _files_of(index)
        else:
            raise UsageError(f"{folder} holds no {_SINGLE} and no {INDEX}; other formats are not read")
        if missing := sorted(file for file in files if not (folder / file).is_file()):
            raise UsageError(f"{index} names {missing[0]}, which is not there; download the model again")
        self._files = {file: self._open(file) for file in sorted(files)}
        self._file_of = {name: file for file, handle in self._files.items() for name in handle.keys()}  # noqa: SIM118
        self._parts = {name: Part(name) for name in self._file_of}

    def under(self, parts: Mapping[str, Part]) -> Tensors:
        """Return the same files' tensors under other names, those alone that are given.

        Parameters
        ----------
        parts
            What each name stands for.
        """
        other = copy.copy(self)
        other._parts = dict(parts)
        return other

    def _open(self, file: str) -> safe_open:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{self.folder / file} can't be read: {error}; download it again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor called ``name``.

        Raises
        ------
        UsageError
            If there is none.
        """
        if name not in self._parts:
            raise UsageError(f"{self.folder} has no tensor {name}, which its configuration promises")
        part = self._parts[name]
        handle = self._files[self._file_of[part.stored]]
        if part.matrix is None:
            return handle.get_tensor(part.stored)
        return handle.get_slice(part.stored)[part.matrix, part.rows]

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self.folder / self._file_of[self._parts[name].stored]

    def layout(self, name: str) -> Layout:
        """Return a tensor's dtype and shape, without reading it."""
        part = self._parts[name]
        stored = self._files[self._file_of[part.stored]].get_slice(part.stored)
        shape = list(stored.get_shape())
        if part.matrix is not None:
            shape = [len(range(*part.rows.indices(shape[1]))), *shape[2:]]
        return Layout(stored.get_dtype(), shape)

    def equal(self, one: str, other: str) -> bool:
        """Tell whether two tables hold the same, some rows of each at a time."""
        names = [self._parts[name].stored for name in (one, other)]
        parts = [self._files[self._file_of[name]].get_slice(name) for name in names]
        rows, *_ = shape = parts[0].get_shape()
        return shape == parts[1].get_shape() and all(
            torch.equal(*(part[start : start + _ROWS] for part in parts)) for start in range(0, rows, _ROWS)
        )
