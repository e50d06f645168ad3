"""What transformers' AutoTokenizer makes of a model's folder, found out in a process of its own.

Run as a script in that process: it imports nothing but transformers, as whoever uses the model would.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Loaded", "UnreadableError", "load", "read"]


class UnreadableError(Exception):
    """Why AutoTokenizer can't read a folder."""


@dataclass(frozen=True)
class Loaded:
    """What a folder's tokenizer is, and the ids that it gives.

    Parameters
    ----------
    kind
        The name of its class.
    eos
        The id of its end-of-sequence token, None without one.
    ids
        Of each text.
    """

    kind: str
    eos: int | None
    ids: list[list[int]]


def load(folders: list[Path], texts: list[str], python: str = sys.executable) -> list[Loaded]:
    """Load the tokenizers of models' folders in a fresh process, and encode texts with each.

    Parameters
    ----------
    folders
        The models' folders.
    texts
        The texts.
    python
        The interpreter, and so the transformers, that does it.

    Raises
    ------
    UnreadableError
        If AutoTokenizer raises an error.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(
        [python, "-P", __file__, *map(str, folders)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        env={**os.environ, **quiet},
    )
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        raise UnreadableError(lines[-1][:300])
    return [Loaded(**found) for found in json.loads(ended.stdout.splitlines()[-1])]


def read(folder: str | Path, texts: list[str]) -> dict[str, Any]:
    """Return what `Loaded` says of a folder, from this process."""
    from transformers import AutoTokenizer  # seconds, in the process that is started for them

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(texts)["input_ids"]
    return {"kind": type(tokenizer).__name__, "eos": tokenizer.eos_token_id, "ids": ids}


def _main() -> None:
    gc.disable()  # or a third of the time goes to looking through what transformers imports
    texts = json.load(sys.stdin)
    print(json.dumps([read(folder, texts) for folder in sys.argv[1:]]))


if __name__ == "__main__":
    _main()
