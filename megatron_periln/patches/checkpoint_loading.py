"""Loading a distributed checkpoint runs no code from it.

Megatron loads with ``weights_only=True``, which asks torch for tensors, plain containers and what
megatron/core/safe_globals.py lists. Two places of torch's distributed checkpoints ask for anything, which
then runs.
"""

from __future__ import annotations

import io
import pickle
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, filesystem

from megatron_periln.patches.registry import changes

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

    DefaultLoadPlanner.load_bytes = checked  # type: ignore[method-assign]
