"""Reading a distributed checkpoint's ``.metadata`` runs no code from it.

The file is a pickle, and torch's ``FileSystemReader.read_metadata``
(torch/distributed/checkpoint/filesystem.py) gives it to ``pickle.load``, which runs whatever it asks
for. All else in a checkpoint is loaded with ``weights_only=True``. Its test in
tests/checkpoints/test_no_code.py fails once torch restricts it.
"""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem

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
    """Restrict what ``FileSystemReader`` unpickles to what describes tensors."""
    filesystem.pickle = SimpleNamespace(load=_load, dump=pickle.dump)  # type: ignore[attr-defined]
