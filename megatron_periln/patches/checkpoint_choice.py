"""Which non-persistent checkpoint Megatron goes on from, and what of a checkpoint strict loading may miss."""

from __future__ import annotations

import functools
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing import validation
from megatron.training import checkpointing

from megatron_periln.patches.registry import changes

__all__ = ["pass_over_unasked_state", "replace_non_persistent"]

# State beside the model, of which Megatron asks for all or none: keys in a checkpoint, by their beginnings.
_RERUN = r"rerun_state_machine_state"  # only where an iteration is to be checked again
_RNG = r"rng_state"  # not in another layout, nor with --no-load-rng or --finetune
_OPTIMIZER = r"(chained_\d+\.)?optimizer\."


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


@changes(
    "megatron.core.dist_checkpointing.validation._determine_missing_and_unexpected_keys",
    why="it takes for missing what Megatron never asks for: every checkpoint holds "
    "`rerun_state_machine_state`, so that `--dist-ckpt-strictness raise_all` refuses any",
    until="patches/test_checkpoint_choice.py::test_upstream_still_misses_what_it_does_not_ask_for",
)
def pass_over_unasked_state(*, optimizer: bool) -> None:
    """Have strict loading miss no state that a run leaves out as a whole; tensors of the model it does miss.

    Parameters
    ----------
    optimizer
        Whether the run leaves the optimizer's state out.
    """
    determine = validation._determine_missing_and_unexpected_keys
    kinds = [_RERUN, _RNG, *([_OPTIMIZER] if optimizer else [])]

    @functools.wraps(determine)
    def without_unasked(saved: Any, local: Any, asked: Any = None) -> tuple[set[str], set[str]]:
        missing, unexpected = determine(saved, local, asked)
        keys = {entry.key for rank in asked or () for entry in rank}
        for kind in kinds:
            if not any(re.match(kind, key) for key in keys):
                missing = {key for key in missing if not re.match(kind, key)}
        return missing, unexpected

    validation._determine_missing_and_unexpected_keys = without_unasked
