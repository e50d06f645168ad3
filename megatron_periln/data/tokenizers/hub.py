"""One question to the Hugging Face hub, where transformers would ask for a minute before it says no."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_periln.errors import PreprocessError

__all__ = ["check_hub"]

_SECONDS = 10


def check_hub(name: str) -> None:
    """Check that the hub has a model of this name, unless there is a folder or a local copy.

    Raises
    ------
    PreprocessError
        If it has none, or cannot be reached.
    """
    if Path(name).exists():
        return
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(name, local_files_only=True)
    except (OSError, ValueError):  # no local copy, which is each of them
        print(f"note: {name} is no local folder: asking the Hugging Face hub", file=sys.stderr, flush=True)
        try:
            huggingface_hub.model_info(name, timeout=_SECONDS)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise PreprocessError(
                f"--tokenizer-model {name}: no such folder, and the Hugging Face hub does not provide it: "
                f"{reason}"
            ) from error
