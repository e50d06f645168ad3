"""Starting llama.cpp's converter and llama.cpp itself, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_periln.errors import UsageError

__all__ = ["LlamaCpp", "Vocabulary"]

_HERE = Path(__file__).parent
_CONVERTER = "convert_hf_to_gguf.py"
_FIND = "import importlib.util as u; print(bool(u.find_spec('llama_cpp') or u.find_spec('cyllama')))"
_QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Vocabulary:
    """What the converter can't know of a tokenizer.

    Parameters
    ----------
    kind
        ``bpe`` or ``sentencepiece``.
    adds
        Whether a text gets a token in front, and one behind.
    special
        Whether special tokens in a text are taken for such.
    space_prefix
        Whether SentencePiece puts a space in front of a text.
    defined
        The ids of its user-defined pieces of several characters.
    """

    kind: str
    adds: tuple[bool, bool]
    special: bool
    space_prefix: bool = True
    defined: tuple[int, ...] = ()


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's source, whose converter is used, and the Python that has llama.cpp.

    Parameters
    ----------
    source
        The folder of convert_hf_to_gguf.py.
    python
        The interpreter.
    """

    source: Path
    python: str

    @classmethod
    def find(cls, folder: Path, python: str | None) -> LlamaCpp:
        """Find both.

        Raises
        ------
        UsageError
            If one is missing; it says what to install.
        """
        source = next(
            (each for each in (folder, folder / "vendor/llama.cpp") if (each / _CONVERTER).is_file()), None
        )
        if source is None or not (source / "conversion").is_dir():
            raise UsageError(
                f"--llama-cpp {folder}: no {_CONVERTER} with its conversion/ there; give a checkout of "
                "llama.cpp (ggml-org/llama.cpp), or the unpacked source of llama-cpp-python: "
                "pip download --no-deps --no-binary llama-cpp-python llama-cpp-python"
            )
        python = python or sys.executable
        try:
            ended = subprocess.run([python, "-c", _FIND], capture_output=True, text=True)
        except OSError as error:
            raise UsageError(f"--llama-cpp-python {python}: {error}") from error
        if ended.stdout.strip() != "True":
            raise UsageError(
                f"{python} has no llama.cpp, in which the file is tried: pip install cyllama (or "
                "llama-cpp-python), or name a Python that has it with --llama-cpp-python"
            )
        return cls(source.resolve(), python)

    def convert(self, files: Mapping[Path, Path], vocabulary: Vocabulary, name: str, kind: str) -> None:
        """Write GGUF files, each of a model's folder, with a pre-tokenizer's name and weights of a kind.

        Raises
        ------
        UsageError
            If the converter fails.
        """
        command = [sys.executable, "-P", str(_HERE / "converter.py"), str(self.source)]
        command += [json.dumps(asdict(vocabulary)), name, kind]
        for folder, file in files.items():
            command += [str(folder.resolve()), str(file)]
        ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_QUIET})
        for folder, file in files.items():
            if ended.returncode or not file.stat().st_size:
                raise UsageError(f"llama.cpp's converter fails on {folder}: {_last(ended)}")

    def run(
        self, file: Path, texts: list[str], special: bool, tokens: list[int], positions: int
    ) -> dict[str, Any]:
        """Return what llama.cpp makes of a file.

        That is ``runtime``, ``ids`` of texts, and ``logits`` of tokens, at the last positions.

        Raises
        ------
        UsageError
            If it can't load it.
        """
        asked = {"file": str(file), "texts": texts, "special": special, "tokens": tokens}
        asked["positions"] = positions
        ended = subprocess.run(
            [self.python, "-P", str(_HERE / "runtime.py")],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
        )
        if ended.returncode:
            raise UsageError(f"llama.cpp ends on the file: {_last(ended)}")
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        if "error" in found:
            raise UsageError(f"llama.cpp can't load the file: {found['error'][:300]}")
        return found


def _last(ended: subprocess.CompletedProcess[str]) -> str:
    lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
    return lines[-1][:300]
