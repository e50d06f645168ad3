"""A base image that stands in for NVIDIA's: this machine's Python, and packages that are names only.

It has no torch that computes: what is tested is that the build leaves those packages alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

TOOLS = ["sh", "cat", "chmod", "find", "mkdir", "rm"]
FROM_THIS_MACHINE = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf", "/etc/resolv.conf"]
LIBRARIES = [
    "libdl.so.2",
    "libgcc_s.so.1",
    "libnss_dns.so.2",
    "libnss_files.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
    "libutil.so.1",
]
UNUSED = re.compile(r".*/(test|tests|idlelib|tkinter|lib2to3|config-3[^/]*|__pycache__|site-packages)")


def root_file_system(target: Path) -> None:
    """Write the tar of a root file system: a shell, a few tools, Python and pip."""
    prefix = Path(sys.base_prefix).resolve()
    python = prefix / "bin" / f"python{sysconfig.get_python_version()}"
    standard = Path(sysconfig.get_path("stdlib", vars={"base": str(prefix), "installed_base": str(prefix)}))
    programs = [python, *(Path(shutil.which(tool) or tool) for tool in TOOLS)]
    needing = [*programs, *(standard / "lib-dynload").glob("*.so")]
    with tarfile.open(target, "w") as tar:
        for folder, mode in {
            "tmp": 0o1777,
            "home": 0o755,
            "root": 0o755,
            "etc": 0o755,
            "proc": 0o555,
        }.items():
            _add(tar, folder, mode=mode)
        for name, text in {"passwd": "root:x:0:0:root:/root:/bin/sh\n", "group": "root:x:0:\n"}.items():
            _add(tar, f"etc/{name}", text.encode())
        _add(tar, "etc/nsswitch.conf", b"hosts: files dns\n")
        _add(tar, "etc/hosts", b"127.0.0.1 localhost\n")
        for program in programs[1:]:
            tar.add(program.resolve(), f"usr/bin/{program.name}")
        for link, name in {"bin": "usr/bin", "usr/bin/python": python, "usr/bin/python3": python}.items():
            entry = tarfile.TarInfo(link)
            entry.type, entry.linkname = tarfile.SYMTYPE, str(name)
            tar.addfile(entry)
        for path in sorted(_libraries(needing)):
            tar.add(path.resolve(), str(path).lstrip("/"))
        tar.add(python.resolve(), str(python).lstrip("/"))
        tar.add(
            standard,
            str(standard).lstrip("/"),
            filter=lambda entry: None if UNUSED.fullmatch(entry.name) else entry,
        )
        pip = Path(sysconfig.get_path("purelib", vars={"base": str(prefix), "installed_base": str(prefix)}))
        for path in pip.glob("pip*"):
            tar.add(path, str(path).lstrip("/"))
        for path in map(Path, FROM_THIS_MACHINE):
            if path.exists():
                tar.add(path.resolve(), str(path).lstrip("/"))


def _add(tar: tarfile.TarFile, name: str, content: bytes | None = None, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.mode = mode
    entry.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
    entry.size = len(content or b"")
    tar.addfile(entry, io.BytesIO(content or b""))


def _libraries(programs: Iterable[Path]) -> set[Path]:
    """Return the shared libraries that programs load, and those that wheels expect of a system."""
    linked = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True).stdout
    cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    found = set(re.findall(r"(/\S+\.so\S*) \(0x", linked))
    for library in LIBRARIES:
        found.update(re.findall(rf"{re.escape(library)} \(libc6,x86-64\) => (\S+)", cache)[:1])
    return set(map(Path, found))


def wheel(folder: Path, name: str, version: str) -> Path:
    """Write the wheel of a package that only has a version."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = {
        f"{module}/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if name == "transformer-engine":
        files[f"{module}/pytorch/__init__.py"] = files[f"{module}/__init__.py"]
    digests = {
        path: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        for path, text in files.items()
    }
    lines = [f"{path},sha256={digests[path]},{len(text)}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""])
    target = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return target
