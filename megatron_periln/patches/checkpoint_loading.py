"""Loading a distributed checkpoint runs no code from it.

Megatron loads with ``weights_only=True``, which asks torch for tensors, plain containers and what
megatron/core/safe_globals.py lists. Two places of torch's distributed checkpoints ask for anything,
which then runs: ``FileSystemReader.read_metadata`` (torch/distributed/checkpoint/filesystem.py)
gives ``.metadata`` to ``pickle.load``, and ``DefaultLoadPlanner.load_bytes`` (default_planner.py) loads
what is no tensor, the arguments among it, with ``weights_only=False``. Their tests in
tests/patches/test_checkpoint_loading.py fail once torch restricts them.
"""

from __future__ import annotations

import io
import pickle
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, filesystem

__all__ = ["restrict"]

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
    return _Unpickler(file, **options).load()


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

    DefaultLoadPlanner.load_bytes = checked  # type: ignore[method-assign]
