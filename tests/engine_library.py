"""An installed Transformer Engine as far as its version and the constants of its library go."""

from __future__ import annotations

import struct
from pathlib import Path

RESHAPE_MODE = b"SetAttribute CUDNN_ATTR_OPERATION_RESHAPE_MODE Failed"
"""What the library says of cudnn-frontend's reshape mode, where it was compiled to set it."""


def elf(constants: bytes) -> bytes:
    """Return a 64-bit ELF file that has ``constants`` in its ``.rodata``, and more in ``.text``."""
    names = b"\0.text\0.rodata\0.shstrtab\0"
    text = b"CUDNN_ATTR_OPERATION_RESHAPE_MODE in code"
    parts = [text, constants, names]
    starts = [64 + sum(map(len, parts[:index])) for index in range(3)]
    sections = [bytes(64)]
    for name, start, part in zip((1, 7, 15), starts, parts, strict=True):
        sections.append(struct.pack("<IIQQQQ24x", name, 1, 0, 0, start, len(part)))
    body = b"".join(parts)
    header = b"\x7fELF\x02\x01\x01".ljust(40, b"\0") + struct.pack("<Q10xHHH", 64 + len(body), 64, 4, 3)
    return header + body + b"".join(sections)


def install(site: Path, *, sets_reshape_mode: bool = True, version: str = "2.17.1") -> Path:
    """Install it into a folder that is to come on the path; return the library."""
    library = site / "transformer_engine/wheel_lib/libtransformer_engine.so"
    library.parent.mkdir(parents=True)
    (site / "transformer_engine/__init__.py").touch()
    library.write_bytes(elf(b"one\0" + (RESHAPE_MODE if sets_reshape_mode else b"another") + b"\0"))
    metadata = site / f"transformer_engine-{version}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n")
    return library
