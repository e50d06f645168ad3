"""What was learned about a tokenizer, kept on disk under the content of its files and the versions in use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_periln.errors import UsageError
from megatron_periln.files import new_folder
from megatron_periln.version import __version__
from megatron_periln.vocabulary_files import KINDS

__all__ = [
    "MAX_BYTES",
    "cache_folder",
    "content_key",
    "files_digest",
    "own_code",
    "read_entry",
    "settings_of",
    "versions",
    "write_entry",
]

_PACKAGES = ("megatron-core", "transformers", "tokenizers", "tiktoken", "sentencepiece", "gigatoken")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp")
_MAX_FILES = 1000
MAX_BYTES = 1 << 29
"""Size of the files of a tokenizer, weights aside, beyond which it gets no key."""
_FLAGS_WITHOUT_EFFECT = ("padded_vocab_size", "pad_vocab_size", "chat_template", "vocab_extra_ids")
_PATHS = ("tokenizer_model", "vocab_file", "merge_file", "metadata_path")


def cache_folder() -> Path:
    """Return the folder of all entries, below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or "~/.cache").expanduser() / "megatron-periln" / "tokenizers"


def versions() -> dict[str, str]:
    """Return the versions of what tokenizes; of installed packages without importing any."""
    names = "|".join(name.replace("-", "[-_]") for name in _PACKAGES)
    pattern = re.compile(rf"({names})-([^-]+)\.(?:dist|egg)-info", re.IGNORECASE)
    found = {"megatron-periln": __version__}
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for entry in os.listdir(folder or "."):  # noqa: PTH208  half the time of Path.iterdir
                if match := pattern.fullmatch(entry):
                    found.setdefault(match[1].lower().replace("_", "-"), match[2])
    if missing := set(_PACKAGES) - found.keys():
        from importlib import metadata  # a twentieth of a second of start-up that most don't need

        for name in missing:  # none, or a checkout on the path, whose folder's name has no version
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
    return dict(sorted(found.items()))


def own_code() -> list[Path]:
    """Return our sources that decide what an entry holds: all of this folder and of its encoders."""
    return sorted(Path(__file__).parent.rglob("*.py"))


def settings_of(args: Namespace, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of tokenizer flags that have an effect, by name (``dest``).

    Parameters
    ----------
    args
        The tokenizer flags, and maybe others.
    flags
        The names of those that have an effect, or may have one, with their defaults.
    """
    names = [name for name in flags if name not in _FLAGS_WITHOUT_EFFECT]
    return {name: getattr(args, name, flags[name]) for name in names}


def files_digest(args: Namespace, flags: Mapping[str, Any]) -> str | None:
    """Return a sha256 of a tokenizer's files and settings, wherever the files are and whatever reads them.

    Parameters
    ----------
    args, flags
        As of `settings_of`.

    Returns
    -------
    None where the files cannot be known: a name on the Hugging Face hub of which there is no local copy, a
    type of which Megatron fetches the files that no flag names, files that cannot be read, or a folder with
    more than half a gigabyte beside the weights.
    """
    values = settings_of(args, flags)
    named = {name: str(value) for name in _PATHS if (value := values.pop(name, None))}
    if not named or (args.tokenizer_type in KINDS and "vocab_file" not in named):
        return None
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    try:
        for name, value in named.items():
            path = Path(value) if Path(value).exists() else _hub_snapshot(value)
            if path is None or (files := _files(path)) is None:
                return None
            # AutoTokenizer may read the kind of model from the folder's name.
            digest.update(f"\0{name}\0{Path(value).absolute().name if path.is_dir() else ''}".encode())
            for file in files:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                digest.update(f"\0{file.name if path.is_dir() else ''}\0{content}".encode())
    except OSError:
        return None
    return digest.hexdigest()


def content_key(args: Namespace, flags: Mapping[str, Any]) -> str | None:
    """Return the key of an entry: a tokenizer's files and settings, where they are, versions and code in use.

    Parameters and what is returned are those of `files_digest`.
    """
    files = files_digest(args, flags)
    if files is None:
        return None
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for source in own_code():
        digest.update(source.read_bytes())
    places = [str(Path(value).absolute()) for name in _PATHS if (value := getattr(args, name, None))]
    digest.update(json.dumps([files, settings_of(args, flags), places], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _files(path: Path) -> list[Path] | None:
    if path.is_file():
        return [path]
    entries = sorted(path.iterdir())
    files = [entry for entry in entries if entry.is_file() and entry.suffix not in _WEIGHTS]
    if len(files) > _MAX_FILES or sum(file.stat().st_size for file in files) > MAX_BYTES:
        return None
    return files


def _hub_snapshot(name: str) -> Path | None:
    home = Path(
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    )
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    repository = hub / ("models--" + name.replace("/", "--"))
    try:
        snapshot = repository / "snapshots" / (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return snapshot if snapshot.is_dir() else None


def read_entry(key: str) -> dict[str, bytes] | None:
    """Return the files of an entry by name; None if there is none or it is damaged."""
    folder = cache_folder() / key
    try:
        sums = json.loads((folder / "sha256.json").read_bytes())
        files = {name: (folder / name).read_bytes() for name in sums}
        if all(hashlib.sha256(files[name]).hexdigest() == expected for name, expected in sums.items()):
            return files
    except (OSError, ValueError, TypeError):
        pass
    return None


def write_entry(key: str, files: Mapping[str, bytes]) -> bool:
    """Write an entry whole or not at all; return whether it could be written."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    damaged = (cache_folder() / key).exists() and read_entry(key) is None
    try:
        with new_folder(cache_folder() / key, flag="XDG_CACHE_HOME", replace=damaged) as folder:
            for name, content in {**files, "sha256.json": json.dumps(sums).encode()}.items():
                (folder / name).write_bytes(content)
    except (OSError, UsageError):  # or another process was faster
        return read_entry(key) is not None
    return True
