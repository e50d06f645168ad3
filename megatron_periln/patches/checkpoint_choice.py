"""Which non-persistent checkpoint Megatron goes on from."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron.training import checkpointing

from megatron_periln.patches.registry import changes

__all__ = ["replace_non_persistent"]


@changes(
    "megatron.training.checkpointing._get_non_persistent_iteration",
    why="Megatron takes the newest non-persistent checkpoint wherever it is not older than the persistent "
    "one, and no flag has it take another: not `--ckpt-step`, whose iteration it then passes over without a "
    "word, and none if that checkpoint is damaged",
    until="patches/test_checkpoint_choice.py::test_upstream_still_prefers_the_non_persistent_to_the_one_asked_for",
)
def replace_non_persistent(replacements: Mapping[int, int]) -> None:
    """Have Megatron find other non-persistent checkpoints than it would.

    Parameters
    ----------
    replacements
        For the iteration of a checkpoint that it would find, that of the one to find; -1 for none. Others are
        found as before: such as those that this run saves, should it be restarted within its processes.
    """
    find = checkpointing._get_non_persistent_iteration

    def replaced(folder: str, args: Namespace, checkpointing_context: Any = None) -> int:
        found = find(folder, args, checkpointing_context)
        return replacements.get(found, found)

    checkpointing._get_non_persistent_iteration = replaced
