"""Loading a distributed checkpoint runs no code from it.

Megatron loads with ``weights_only=True``, which asks torch for tensors, plain containers and what
megatron/core/safe_globals.py lists. Two places of torch's distributed checkpoints ask for anything, which
then runs.
"""

from __future__ import annotations

import functools
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.rerun_state_machine import Call, Caller
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, filesystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_periln.patches.registry import changes

__all__ = ["describe_tensors_without_strides", "restrict", "why_unreadable"]

_ALLOWED = {
    "builtins": {"dict", "list", "set", "tuple"},
    "collections": {"OrderedDict"},
    "io": {"BytesIO"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}

_restricted = False


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's .metadata: not loaded")


def _load(file: IO[bytes], **options: Any) -> Any:
    try:
        return _Unpickler(file, **options).load()
    except ValueError as error:
        if "too many values to unpack" not in str(error):  # of TensorProperties.__setstate__
            raise
        raise pickle.UnpicklingError(
            f"a newer torch than this {torch.__version__} wrote it, whose .metadata has more values to a "
            "tensor (torch 2.15 added the sixth); it is not damaged: install the torch that wrote it"
        ) from error


def why_unreadable(path: Path) -> str | None:
    """Return what is wrong with the .metadata of a distributed checkpoint, None if nothing is.

    Where torch reads it for all ranks, it tells no more than that there is none.
    """
    try:
        with (path / ".metadata").open("rb") as stream:
            _load(stream)
    except (pickle.UnpicklingError, OSError, EOFError) as error:
        return str(error)
    return None


@changes(
    "megatron.core.dist_checkpointing.strategies.torch.TorchDistLoadShardedStrategy.load_tensors_metadata",
    why="it gives all properties of a tensor to `torch.empty`, and torch 2.15 added one that is no "
    "argument of it: every `--dist-ckpt-strictness` but the default ends in a TypeError",
    until="patches/test_checkpoint_loading.py::test_upstream_still_gives_strides_to_empty",
)
def describe_tensors_without_strides() -> None:
    """Have Megatron read the properties of saved tensors that it knows."""
    load = TorchDistLoadShardedStrategy.load_tensors_metadata

    @functools.wraps(load)
    def without_strides(self: Any, checkpoint_dir: Path, metadata: Any = None) -> Any:
        metadata = metadata or FileSystemReader(checkpoint_dir).read_metadata()
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                vars(entry.properties).pop("strides", None)
        return load(self, checkpoint_dir, metadata)

    TorchDistLoadShardedStrategy.load_tensors_metadata = without_strides


@changes(
    "torch.distributed.checkpoint.filesystem.pickle",
    "torch.distributed.checkpoint.DefaultLoadPlanner.load_bytes",
    why="`FileSystemReader.read_metadata` gives `.metadata` to `pickle.load`, and `load_bytes` loads "
    "what is no tensor, the arguments among it, with `weights_only=False`: either runs any code "
    "that is in a checkpoint",
    until=(
        "patches/test_checkpoint_loading.py::test_upstream_still_loads_any_object_from_the_metadata",
        "patches/test_checkpoint_loading.py::test_upstream_still_loads_any_object_that_is_no_tensor",
    ),
)
def restrict() -> None:
    """Restrict what is unpickled from distributed checkpoints to what holds no code; once."""
    global _restricted
    if _restricted:
        return
    _restricted = True
    module: Any = filesystem
    module.pickle = SimpleNamespace(load=_load, dump=pickle.dump)
    load_bytes = DefaultLoadPlanner.load_bytes

    def checked(self: Any, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, map_location="cpu", weights_only=True)  # raises if there is more
        value.seek(0)
        load_bytes(self, read_item, value)

    # Named tuples, of a checkpoint that the rerun state machine has saved at a NaN.
    torch.serialization.add_safe_globals([Call, Caller])
    DefaultLoadPlanner.load_bytes = checked  # type: ignore[method-assign]
