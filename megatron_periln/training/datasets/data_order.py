"""Which samples a run deals, in which order: a run that goes on deals those that are left.

Megatron orders all samples by how many are asked for. Across the end of an epoch a longer run deals others
from its first sample on (``_build_document_sample_shuffle_indices``, megatron/core/datasets/gpt_dataset.py),
and so does one with another seed, split or blend. A run that went on in another order would meet samples
again and miss others. So a checkpoint holds digests of some samples, compared when it is continued.
"""

from __future__ import annotations

import hashlib
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_periln.checkpoints.intact import FLAG_GROUP
from megatron_periln.errors import UsageError

__all__ = ["add_data_order_arguments", "digests_of", "keep_order", "remember", "samples_to_order"]

_NAMES = {
    "data_order_samples": "--data-order-samples",
    "train_iters": "--train-iters",
    "train_samples": "--train-samples",
    "global_batch_size": "--global-batch-size",
    "micro_batch_size": "--micro-batch-size",
    "data_parallel_size": "the data-parallel size",
    "seed": "--seed",
    "split": "--split",
    "seq_length": "--seq-length",
    "data_path": "--data-path",
    "data_args_path": "--data-args-path",
    "train_data_path": "--train-data-path",
    "per_split_data_args_path": "--per-split-data-args-path",
    "dataloader_type": "--dataloader-type",
}
"""What may make the order another one."""

_before: list[Namespace] = []
"""The arguments of the checkpoint that the run goes on from, if there is one."""


def add_data_order_arguments(parser: ArgumentParser) -> None:
    """Add the flags that fix the order of the samples, and let it change."""
    groups = {group.title: group for group in parser._action_groups}
    groups[FLAG_GROUP].add_argument(
        "--allow-data-changes", action="store_true", help="load one that was trained on other samples"
    )
    groups[FLAG_GROUP].add_argument(
        "--data-order-samples",
        type=int,
        metavar="N",
        help="order the data as for a run of N samples",
    )


def remember(saved: Namespace | None) -> None:
    """Remember the arguments of the checkpoint that the run goes on from, as `keep_order` needs them."""
    _before[:] = [] if saved is None else [saved]


def samples_to_order(args: Namespace, samples: int) -> int:
    """Return for how many samples the data are ordered.

    Parameters
    ----------
    args
        Megatron's and ours.
    samples
        Which the run trains with.

    Raises
    ------
    UsageError
        If ``--data-order-samples`` are fewer.
    """
    if args.data_order_samples is None:
        return samples
    if args.data_order_samples < samples:
        raise UsageError(
            f"--data-order-samples {args.data_order_samples} are fewer than the {samples} that this run "
            "trains with; give as many as the run may ever grow to, from its start"
        )
    return int(args.data_order_samples)


def keep_order(args: Namespace, dataset: Any) -> None:
    """Compare the order of the training samples with the checkpoint's, and have the next one hold it.

    All ranks call it at once; the first has the dataset.

    Parameters
    ----------
    args
        Megatron's, with a checkpoint loaded; gets ``data_order``, which Megatron saves with all others.
    dataset
        The training samples, `index_cache.GPTDataset` or `BlendedDataset`; None on ranks that read none.

    Raises
    ------
    UsageError
        If the checkpoint to continue was trained on samples in another order; not with
        ``--allow-data-changes``, nor with ``--skip-train``.
    """
    found: list[Any] = [digests_of(args, dataset) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found, src=0)
    args.data_order = found[0]
    trains = args.consumed_train_samples and not args.skip_train
    saved = _before[0] if _before and trains else None
    theirs = getattr(saved, "data_order", None)
    if saved is None or args.data_order is None or theirs is None or args.allow_data_changes:
        return
    others = [sample for sample, digest in theirs.items() if args.data_order.get(sample, digest) != digest]
    if others:
        names = [
            f"{flag} {_shown(before)}, and here {_shown(getattr(args, name))}"
            for name, flag in _NAMES.items()
            if (before := getattr(saved, name, None)) != getattr(args, name)
        ]
        raise UsageError(
            f"the checkpoint was trained on other samples, or in another order: {len(others)} of the "
            f"{len(theirs)} that were compared differ ({'; '.join(names) or 'the data have changed'}); this "
            "run would meet some again and miss others: give what it was trained with (for a longer run "
            "--data-order-samples, from its start), or --allow-data-changes if the change is meant"
        )


def digests_of(args: Namespace, dataset: Any) -> dict[int | str, str] | None:
    """Return digests of the tokens of some samples by their number, and what else decides the order.

    The more samples there are the farther apart they are, so that those of a shorter run are among them.
    """
    if dataset is None or not len(dataset):
        return None
    digests: dict[int | str, str] = {
        number: hashlib.blake2b(_tokens(dataset, number).tobytes(), digest_size=8).hexdigest()
        for number in _numbers(len(dataset))
    }
    if args.dataloader_type != "single":  # it shuffles the samples itself, as many as each rank takes at once
        once = args.micro_batch_size * args.data_parallel_size
        digests["loader"] = f"{args.dataloader_type}, {len(dataset)} samples, {once} at once"
    return digests


def _numbers(samples: int) -> Iterator[int]:
    number = 0
    while number < samples:
        yield number
        number = max(number + 1, number * 5 // 4)


def _tokens(dataset: Any, number: int) -> np.ndarray:
    """Return the tokens of a sample, without its masks, which may take long to build."""
    while (inner := getattr(dataset, "datasets", None)) is not None:
        if dataset.dataset_index is None:  # mapped at the first access
            dataset[number]
        which, number = int(dataset.dataset_index[number]), int(dataset.dataset_sample_index[number])
        dataset = inner[which]
    tokens: np.ndarray = dataset._query_document_sample_shuffle_indices(number)[0]
    return tokens


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
