"""Whether the cuDNN that runs here knows what Transformer Engine's library asks of it.

Transformer Engine's packages ask for no cuDNN, and torch asks for exactly one. The library holds NVIDIA's
cudnn-frontend, which sets some attributes of an operation wherever the headers that it was compiled with have
them, without asking which cuDNN runs; an older one answers BAD_PARAM. The library doesn't say which headers
those were, but the text of the failure that it would report is among its constants.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import mmap
import os
import struct
from pathlib import Path

from megatron_periln.package_versions import VersionMismatch

__all__ = [
    "choose_attention",
    "dotted",
    "find_cudnn_mismatch",
    "least_cudnn",
    "running_cudnn",
    "transformer_engine_library",
    "transformer_engine_version",
]

_SETS_UNASKED = {b"CUDNN_ATTR_OPERATION_RESHAPE_MODE": 92200}
"""What cudnn-frontend sets whatever cuDNN runs (include/cudnn_frontend/node/reshape.h, in the backward pass
of attention), and the first cuDNN that knows it, as ``cudnnGetVersion`` says it."""

_WITHOUT = "2.17"
"""The first Transformer Engine whose wheels set it; those of 2.14.1 and 2.16.1 do not, 2.20.2's do."""

_HEADER, _SECTION = struct.Struct("<40xQ10xHHH"), struct.Struct("<IIQQQQ24x")  # of ELF, 64 bits


def choose_attention(backend: str) -> None:
    """Have Transformer Engine take what ``--attention-backend`` names, where the environment doesn't say.

    Megatron does the same when it builds a model, and refuses an environment that says something else
    (language_module.py).
    """
    for name in ("flash", "fused", "unfused"):
        os.environ.setdefault(f"NVTE_{name.upper()}_ATTN", str(int(backend in ("auto", name))))


def transformer_engine_library() -> Path | None:
    """Return the library of Transformer Engine, from where its own loader takes it; None without one."""
    try:
        spec = importlib.util.find_spec("transformer_engine")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    folders = (package.parent, package, package / "wheel_lib")
    return next((path for folder in folders if (path := folder / "libtransformer_engine.so").is_file()), None)


def least_cudnn(library: Path) -> int | None:
    """Return the oldest cuDNN that a library of Transformer Engine works with, None if that can't be told.

    Reads its constants alone, 3 MB of up to 700.

    Returns
    -------
    int
        As ``cudnnGetVersion`` says it: 92200 for 9.22.0. 0 for any cuDNN 9.
    """
    if not library.stat().st_size:  # which can't be mapped
        return None
    with library.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as file:
        constants = _section(file, b".rodata")
    if constants is None:
        return None
    return max((version for text, version in _SETS_UNASKED.items() if text in constants), default=0)


def _section(file: mmap.mmap, wanted: bytes) -> bytes | None:
    """Return the section of an ELF file by its name, None if there is none or it is no such file."""
    if file[:6] != b"\x7fELF\x02\x01":
        return None
    offset, size, count, of_names = _HEADER.unpack_from(file)
    sections = [_SECTION.unpack_from(file, offset + index * size) for index in range(count)]
    names = sections[of_names][4]
    for name, _, _, _, start, length in sections:
        if file[names + name : file.find(b"\0", names + name)] == wanted:
            return file[start : start + length]
    return None


def running_cudnn() -> int | None:
    """Return the version of the cuDNN that torch has loaded, as ``cudnnGetVersion`` says it."""
    import torch  # seconds, which tools that ask nothing of cuDNN need not take

    return torch.backends.cudnn.version()


def find_cudnn_mismatch() -> VersionMismatch | None:
    """Return why Transformer Engine's fused attention can't go backward here, None if nothing is known to."""
    library = transformer_engine_library()
    running = running_cudnn() if library else None
    least = least_cudnn(library) if library and running else None
    if running is None or not least or running >= least:
        return None
    return VersionMismatch(
        f"{transformer_engine_version()} needs cuDNN {dotted(least)} or newer for the backward pass of its "
        f"fused attention, and here is cuDNN {dotted(running)}",
        _remedy(least),
    )


def transformer_engine_version() -> str:
    """Return Transformer Engine's name and version, as far as it says it."""
    try:
        return f"Transformer Engine {importlib.metadata.version('transformer-engine')}"
    except importlib.metadata.PackageNotFoundError:
        return "Transformer Engine"


def _remedy(least: int) -> str:
    import torch  # loaded by now

    wheel = f"nvidia-cudnn-cu{(torch.version.cuda or '13').partition('.')[0]}"
    newer = f"{least // 10000}.{least // 100 % 100}"
    others = f"transformer-engine before {_WITHOUT} or --attention-backend unfused do without it"
    try:
        importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return f"raise this installation's cuDNN to {newer}; {others}"
    return f"pip install '{wheel}>={newer}', although torch {torch.__version__} asks for another; {others}"


def dotted(version: int) -> str:
    """Return a version that ``cudnnGetVersion`` says, as people write it: 92200 is 9.22.0."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
