"""The folder of a model of transformers: whether it is one, and the tokenizer's files in it.

Imports neither torch nor Megatron, so that a wrong ``--model`` is told at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_periln.errors import UsageError, with_kind

__all__ = ["TOKENIZER_FILES", "SpecialTokens", "check_model_folder", "transformers_config"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files of a tokenizer in transformers."""


def check_model_folder(model: Path) -> None:
    """Refuse a ``--model`` that is no folder of a model of transformers.

    Raises
    ------
    UsageError
        If it is none.
    """
    if not model.is_dir():
        raise UsageError(f"--model {model}: no such folder; hub names are not fetched, download it first")
    if not (model / "config.json").is_file() and (model / "adapter_config.json").is_file():
        raise UsageError(
            f"--model {model} holds an adapter alone (adapter_config.json); merge it into its model first "
            "(merge_and_unload() of PEFT, then save_pretrained)"
        )
    if not (model / "config.json").is_file():
        raise UsageError(
            f"--model {model} holds no config.json; give the folder of a downloaded or exported model"
        )


def transformers_config(model: Path) -> Any:
    """Return a model's configuration in transformers, by no code but its own.

    Raises
    ------
    UsageError
        If transformers can't follow it.
    """
    from transformers import AutoConfig  # not above: an export, and what is refused, do without these seconds

    try:
        return AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each architecture's own code, which fails in its own ways
        raise UsageError(
            f"--model {model}: transformers can't read its config.json: {with_kind(error, 300)}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of a tokenizer's special tokens; None where it has none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    def as_settings(self, no_eos: list[int] | None = None) -> dict[str, int | list[int] | None]:
        """Return them under the names that transformers gives them.

        Parameters
        ----------
        no_eos
            What says that there is no end-of-sequence token.
        """
        eos = no_eos if self.eos is None else self.eos
        return {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self.pad}
