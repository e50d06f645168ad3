"""Reading a distributed checkpoint tensor by tensor, whatever parallel layout wrote it, without its model."""

from __future__ import annotations

import functools
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_periln.checkpoints.saved_arguments import checkpoint_path, saved_arguments
from megatron_periln.checkpoints.sources import NON_PERSISTENT, iteration_of, tracker_of
from megatron_periln.errors import UsageError
from megatron_periln.megatron_arguments import megatron_arguments

__all__ = ["NORM_BEFORE_EXPERTS", "Checkpoint"]

NORM_BEFORE_EXPERTS = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
"""The norm before an MLP in a checkpoint: in the first linear, where Megatron's local layers save that before
experts too, and by itself, as Transformer Engine saves that."""

_LAYERS = "decoder.layers."
_EMBEDDING = "embedding.word_embeddings.weight"  # every GPT's; in the dtype of all its weights


class Checkpoint:
    """A distributed checkpoint (``--ckpt-format torch_dist``): its arguments, and its tensors one by one.

    Parameters
    ----------
    folder
        What ``--load`` takes.
    step
        Which iteration; None for the latest.

    Attributes
    ----------
    path
        The iteration's folder.
    args
        Megatron's arguments, saved with it; those that an earlier version did not know, at their defaults.
    dtype
        Of the model's parameters.

    Raises
    ------
    UsageError
        If there is no such checkpoint, or it can't be read this way.
    """

    def __init__(self, folder: Path, step: int | None = None) -> None:
        wanted = Namespace(load=str(_holds(folder, step)), ckpt_step=step)
        path = checkpoint_path(wanted)
        if path is None:
            raise UsageError(f"--load {folder}: {_what_is_there(folder)}")
        if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
            raise UsageError(
                f"--load {folder}: {path.name} is not a distributed checkpoint; load it with Megatron and "
                "save it with --ckpt-format torch_dist"
            )
        args = saved_arguments(wanted)
        if args is None:
            raise UsageError(f"--load {folder}: {path.name} holds no arguments, so its model is unknown")
        self.path, self.args = path, Namespace(**{**_defaults(), **vars(args)})
        self._reader = FileSystemReader(path)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors: Mapping[str, Any] = metadata.state_dict_metadata
        self._parts: dict[str, _Parts] = {}
        self.dtype: torch.dtype = self._entry(_EMBEDDING).properties.dtype

    def read(self, name: str, layer: int | None = None, expert: int | None = None) -> Tensor:
        """Return a tensor of the model at its full shape, in the dtype that it was saved in.

        Parameters
        ----------
        name
            Megatron's name; within a layer, where ``layer`` is given.
        layer
            The layer's index from 0.
        expert
            The index of one expert, where ``name`` is of those of a layer.

        Raises
        ------
        UsageError
            If the checkpoint has no such tensor.
        """
        key, indices = self._find(name, layer)
        if expert is not None:
            indices.append(expert)
        entry = self._entry(key)
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        for dimension, index in enumerate(indices):
            offsets[dimension], sizes[dimension] = index, 1
        region = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        target = torch.empty(sizes, dtype=entry.properties.dtype, device="cpu")
        if key not in self._parts:
            self._parts[key] = _Parts(entry)
        plan = LoadPlan(create_read_items_for_chunk_list(key, self._parts[key].at(indices), [region]))
        self._reader.read_data(plan, _Into(target))
        return target.reshape(sizes[len(indices) :])

    def _find(self, name: str, layer: int | None) -> tuple[str, list[int]]:
        """Return the key of a tensor, and the indices in its first dimensions."""
        if layer is None:
            return name, []
        names = dict.fromkeys((name, name.replace(*NORM_BEFORE_EXPERTS)))
        keys = [key for each in names for key in (f"{_LAYERS}{each}", f"{_LAYERS}{layer}.{each}")]
        # The layer is in the key with --hetereogenous-dist-checkpoint, or a list as --moe-layer-freq.
        key = next((key for key in keys if key in self._tensors), keys[1])
        return key, [] if key.startswith(f"{_LAYERS}{layer}.") else [layer]

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._tensors.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise UsageError(f"{self.path} has no tensor {key}, which its arguments promise")
        return entry


@functools.cache
def _defaults() -> dict[str, Any]:
    """Return Megatron's arguments where no flag is given: of a version after 0.18, 0.19 has 37 more."""
    return vars(megatron_arguments([]))


def _holds(folder: Path, step: int | None) -> Path:
    """Return the folder to read: that of non-persistent checkpoints in it if there are no others."""
    inner = folder / NON_PERSISTENT
    persistent = tracker_of(folder) is not None or (step and (folder / f"iter_{step:07d}").is_dir())
    if persistent or tracker_of(inner) is None:
        return folder
    print(f"--load {folder}: no persistent checkpoint, so that in {inner.name} is read", file=sys.stderr)
    return inner


def _what_is_there(folder: Path) -> str:
    """Return what there is instead of a checkpoint that can be read, and what to do."""
    if found := sorted(number for path in folder.glob("iter_*") if (number := iteration_of(path))):
        return (
            "there is no latest_checkpointed_iteration.txt, but checkpoints of iteration "
            f"{', '.join(map(str, found))}; give --ckpt-step {found[-1]}"
        )
    if files := [*folder.glob("*/iter_*_local.pt"), *folder.glob("iter_*_local.pt")]:
        iterations = sorted({int(path.name.split("_")[1]) for path in files})
        return (
            f"there are local checkpoints alone (--non-persistent-ckpt-type local), of iteration "
            f"{', '.join(map(str, iterations))}: each rank's own file, which only as many ranks can read; go "
            f"on with the run, with --non-persistent-local-ckpt-dir {folder} and a --save-interval that "
            "saves a persistent one, and give its --save folder"
        )
    return (
        "there is no checkpoint; give the folder that --save wrote, which holds "
        "latest_checkpointed_iteration.txt"
    )


class _Parts:
    """The parts in which a tensor was saved, by where they lie.

    torch looks through all of them at each reading: of a layer's experts they are one an expert of every
    layer, all of which are read.
    """

    def __init__(self, entry: TensorStorageMetadata) -> None:
        self._entry = entry
        self._by_place: dict[int, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def at(self, indices: list[int]) -> TensorStorageMetadata:
        """Return the tensor as if it had been saved with no parts but those at an index, or several."""
        count = len(indices)
        if count not in self._by_place:
            places = self._by_place[count] = defaultdict(list)
            for part in self._entry.chunks:
                for place in product(*map(range, part.offsets[:count], _ends(part)[:count])):
                    places[place].append(part)
        return replace(self._entry, chunks=self._by_place[count].get(tuple(indices), []))


def _ends(part: ChunkStorageMetadata) -> list[int]:
    return [offset + size for offset, size in zip(part.offsets, part.sizes, strict=True)]


class _Into(DefaultLoadPlanner):
    """Reads into one tensor, whatever the key: each item of the plan has its offsets in it."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.target
