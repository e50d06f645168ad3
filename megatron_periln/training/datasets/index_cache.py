"""Megatron's cache of dataset indices: its names tell which data it is of, and a file in it is whole.

Megatron names what it caches by the path of a dataset, not by what is there: a corpus that was preprocessed
anew under its old name would be read by the index of the old one.
"""

from __future__ import annotations

import copy
import errno
import functools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path

from megatron_periln.data.indexed.content import Content, content_of
from megatron_periln.errors import UsageError
from megatron_periln.files import locked, sync

__all__ = ["BlendedDataset", "Builder", "GPTDataset", "GPTDatasetConfig", "content_of", "contents_of"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNFINISHED = "unfinished-"
_ABANDONED_AFTER = 3600.0
"""Seconds."""
Indices = tuple[Any, ...]


@dataclass
class GPTDatasetConfig(gpt_dataset.GPTDatasetConfig):
    """Megatron's, and what the datasets hold.

    Parameters
    ----------
    contents
        What `contents_of` returns.
    content
        That of the dataset that has this configuration; a part of the name of its cache.
    """

    contents: dict[str, Content] = field(default_factory=dict, repr=False)
    content: Content | None = None


class GPTDataset(gpt_dataset.GPTDataset):
    """Megatron's, whose cached index is of the data that are there."""

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: Any,
        num_samples: int | None,
        index_split: Any,
        config: GPTDatasetConfig,
    ) -> None:
        config = copy.copy(config)
        config.content = config.contents.get(dataset_path or "") or _counts(indexed_dataset)
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*gpt_dataset.GPTDataset._key_config_attributes(), "content"]

    def _build_document_sample_shuffle_indices(self) -> Indices:
        folder = self.config.path_to_cache or _beside(self.dataset.path_prefix, self)
        stem = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        names = ("document_index.npy", "sample_index.npy", "shuffle_index.npy", "description.txt")
        build = super()._build_document_sample_shuffle_indices
        return _cached(self, folder, [f"{stem}-{name}" for name in names], build)


class BlendedDataset(blended_dataset.BlendedDataset):
    """Megatron's, whose cached index is whole, and which knows the sample without a loss, None.

    Without ``path_to_cache`` the index is cached beside the first of its datasets, as that dataset's own is;
    Megatron has each rank compute it at every start. Where nothing can be written, each rank does here too.
    """

    config: Any

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        if idx is None:
            return {"dataset_id": np.int16(0), **self.datasets[0][None]}
        return super().__getitem__(idx)

    def _build_indices(self) -> Indices:
        stem = f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}"
        files = ("dataset_index.npy", "dataset_sample_index.npy", "description.txt")
        names = [f"{stem}-{file}" for file in files]
        build, config = super()._build_indices, self.config
        if config.path_to_cache:
            return _cached(self, config.path_to_cache, names, build)
        if folder := self._beside_the_first():
            self.config = copy.copy(config)
            self.config.path_to_cache = folder
            try:
                # The first rank has built it before the others come here, if it can be.
                if _is_first_rank() or all(_is_whole(Path(folder, name)) for name in names):
                    return _cached(self, folder, names, build)
            except UsageError:
                pass
            finally:
                self.config = config
        return build()

    def _beside_the_first(self) -> str | None:
        prefix = getattr(getattr(self.datasets[0], "dataset", None), "path_prefix", None)
        if not prefix or is_object_storage_path(prefix):
            return None
        return _beside(prefix, self)


class Builder(BlendedMegatronDatasetBuilder):
    """Megatron's, which blends by the class above."""

    @staticmethod
    def build_generic_dataset(cls: Any, *args: Any) -> Any:
        """Build a dataset as Megatron does, which calls every error of files missing access to the cache."""
        kind = BlendedDataset if cls is blended_dataset.BlendedDataset else cls
        try:
            return BlendedMegatronDatasetBuilder.build_generic_dataset(kind, *args)
        except Exception as error:
            if type(error) is Exception and isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise


def contents_of(prefixes: Iterable[str]) -> dict[str, Content]:
    """Return `content_of` every dataset that is not in object storage; on all ranks what the first one sees.

    Nodes may see other times, with copies of their own or old entries of a network file system.
    """
    found: list[Any] = [None]
    if _is_first_rank():
        local = {prefix for prefix in prefixes if not is_object_storage_path(prefix)}
        found = [{prefix: content_of(prefix) for prefix in sorted(local)}]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def _counts(dataset: IndexedDataset) -> Content:
    """Return what a dataset in object storage, of which the .idx file is here, shows of its data."""
    lengths, pointers = dataset.index.sequence_lengths, dataset.index.sequence_pointers
    last = [int(pointers[-1]), int(lengths[-1])] if len(lengths) else []
    return {"sequences": len(lengths), "documents": len(dataset.document_indices) - 1, "last": last}


def _beside(prefix: str, dataset: object) -> str:
    """Return where Megatron caches indices of a dataset's kind beside the data of a prefix."""
    return str(Path(prefix, "cache", f"{type(dataset).__name__}_indices"))


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _cached(dataset: Any, folder: str, names: list[str], build: Callable[[], Indices]) -> Indices:
    """Return indices of a dataset, which ``build`` finds in its cache or puts there; there they appear whole.

    Several jobs may build the same indices at once, in a folder that they share, and each may be killed.

    Parameters
    ----------
    dataset
        It has ``config``, whose ``path_to_cache`` says to ``build`` where the cache is.
    folder
        The cache.
    names
        The files in it.

    Raises
    ------
    UsageError
        If the cache cannot be written, or must be there and is not, or is cut off.
    """
    config = dataset.config
    if not _is_first_rank():
        return build()
    there = all(_is_whole(Path(folder, name)) for name in names)
    if not there and (config.fast_cache_load or config.defer_npy_index_mmap):
        raise UsageError(
            f"--data-cache-path {folder}: no whole index there for these data and settings, and "
            "--dataloader-fast-cache-load and --dataloader-defer-npy-index-mmap build none; "
            "start once without them"
        )
    if there:
        return build()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _remove_abandoned(Path(folder))
        with (
            tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=folder) as temporary,
            locked(Path(temporary)),
        ):
            dataset.config = copy.copy(config)
            dataset.config.path_to_cache = temporary
            indices = build()
            for name in names:
                sync(Path(temporary, name))
                Path(temporary, name).replace(Path(folder, name))
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise
        what = "its disk is full; make room, or" if _is_full(error) else f"{error};"
        raise UsageError(
            f"{folder}: the index of the data cannot be cached there: {what} choose another --data-cache-path"
        ) from error
    finally:
        dataset.config = config
    return indices


@functools.cache
def _remove_abandoned(folder: Path) -> None:
    """Remove what killed jobs left in a cache: no process holds it, nor has a job made it just now.

    Once a process: each dataset of a blend has files in it, and to list them for each would be quadratic.
    """
    for left in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_AFTER:
                with locked(left) as abandoned:
                    if abandoned:
                        shutil.rmtree(left)


def _is_whole(path: Path) -> bool:
    """Tell whether a file of a cache is there, an array as long as its header says.

    Megatron writes arrays under their names, so that a kill or a full disk may have cut one off, and it
    reads whatever bears the name.
    """
    try:
        if path.suffix != ".npy":
            return path.is_file()
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(stream)
            return path.stat().st_size == stream.tell() + math.prod(shape) * dtype.itemsize
    except (OSError, ValueError):
        return False


def _is_full(error: OSError) -> bool:
    """Tell whether a write failed for want of room, of which numpy tells no more than what it wrote."""
    return error.errno in _FULL or (error.errno is None and " requested and " in str(error))
