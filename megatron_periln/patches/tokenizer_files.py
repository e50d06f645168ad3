"""Megatron's tokenizers that two files describe are built from these files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from megatron_periln.patches.registry import changes
from megatron_periln.patches.starting.late_imports import leave_transformers_out
from megatron_periln.vocabulary_files import KINDS, write_tokenizer_folder

with leave_transformers_out():
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
    from megatron.core.tokenizers.text.libraries.megatron_hf_tokenizer import MegatronHFTokenizer

__all__ = ["read_vocabulary_files"]


@changes(
    "megatron.core.tokenizers.text.libraries.megatron_hf_tokenizer.MegatronHFTokenizer.__init__",
    why="it asks the Hugging Face hub for `gpt2`, whatever `--vocab-file` and `--merge-file` hold, and gives "
    "their paths to `AutoTokenizer.from_pretrained`, which passes them over in transformers 5: without a "
    "network nothing is built, with one GPT-2's own vocabulary",
    until=(
        "patches/test_tokenizer_files.py::test_upstream_still_asks_the_hub_whatever_files_there_are",
        "patches/test_tokenizer_files.py::test_upstream_still_ignores_the_files_where_the_hub_answers",
    ),
)
def read_vocabulary_files() -> None:
    """Build a tokenizer from its vocabulary and merges, once both are given."""
    MegatronHFTokenizer.__init__ = _from_files


_without_files = MegatronHFTokenizer.__init__


def _from_files(
    self: Any,
    tokenizer_path: str,
    vocab_file: str | None = None,
    merges_file: str | None = None,
    **options: Any,
) -> None:
    kind = KINDS.get(tokenizer_path)
    if kind is None or vocab_file is None or (kind.merges is not None and merges_file is None):
        _without_files(self, tokenizer_path, vocab_file, merges_file, **options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer_folder(tokenizer_path, vocab_file, merges_file, Path(folder))
        HuggingFaceTokenizer.__init__(self, folder, **options)
