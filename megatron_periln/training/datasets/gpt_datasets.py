"""GPT datasets from the command line."""

from __future__ import annotations

import errno
import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core import mpu
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import MockGPTDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_periln.data.indexed.format import IndexedDatasetInfo, check_indexed_dataset
from megatron_periln.data.indexed.sidecar import Sidecar, sidecar_path
from megatron_periln.errors import PreprocessError, RankError, UsageError
from megatron_periln.files import allow_open_files
from megatron_periln.models.from_arguments import transformer_config
from megatron_periln.training.datasets.data_order import keep_order, samples_to_order
from megatron_periln.training.datasets.index_cache import Builder, GPTDataset, GPTDatasetConfig, contents_of

__all__ = [
    "check_data",
    "dataset_config",
    "masks_documents",
    "predicts_more_tokens_here",
    "train_valid_test_datasets",
]

# Its .bin and .idx files, and three indices of each of three splits, mapped.
_FILES_OF_A_DATASET = 13


def check_data(args: Namespace) -> None:
    """Check every indexed dataset that the arguments name.

    Those in object storage are left to Megatron.

    Raises
    ------
    UsageError
        If none is named, one is missing or damaged, or holds ids that the model lacks; or if ``--split``
        leaves a part of one empty, on which Megatron would loop for ever; or if
        ``--per-dataset-sequences-path`` says what is not so.
    """
    if args.mock_data:
        return
    if args.data_path and args.data_args_path:
        raise UsageError("--data-path and --data-args-path both name the data; give one of them")
    prefixes = set(_prefixes(args))
    if not prefixes:
        raise UsageError(
            "no data: give --data-path PREFIX (made by tools/preprocess_data.py), or --mock-data"
        )
    lengths = _lengths(args)
    others: dict[str, str] = {}
    for prefix in sorted(prefix for prefix in prefixes if not is_object_storage_path(prefix)):
        info = check_indexed_dataset(prefix, every_sequence=False)
        if args.split is not None:
            _check_split(args.split, prefix, info.sequences)
        if lengths is not None:
            _check_lengths(args.per_dataset_sequences_path, lengths, prefix, info)
        if other := _other_tokenizer(args, prefix, info):
            others.setdefault(other, prefix)
    for other, prefix in others.items():
        print(
            f"warning: {prefix} was made with {other}; this run's tokenizer is {args.tokenizer_type}, of "
            f"{get_tokenizer().vocab_size:,} ids: do they mean the same?",
            flush=True,
        )


def _other_tokenizer(args: Namespace, prefix: str, info: IndexedDatasetInfo) -> str | None:
    """Return what the dataset's sidecar, if it has one, says of its tokenizer, if that is another."""
    try:
        sidecar = Sidecar.read_summary(sidecar_path(prefix))
    except PreprocessError:  # none, or of a later version
        return None
    if (sidecar.sequences, sidecar.dtype) != (info.sequences, str(info.dtype)):  # of what was here before
        return None
    theirs = sidecar.tokenizer
    made = f"{theirs['type']}, of {theirs['vocab_size']:,} ids"
    if args.padded_vocab_size is not None and theirs["vocab_size"] > args.padded_vocab_size:
        raise UsageError(
            f"{prefix} was made with {made}, and this run's model has {args.padded_vocab_size:,}; give the "
            "tokenizer that it was made with, or preprocess the text again"
        )
    if args.tokenizer_type.startswith("Null"):
        return None
    same = (theirs["type"], theirs["vocab_size"]) == (args.tokenizer_type, get_tokenizer().vocab_size)
    return None if same else made


def _check_split(split: str, prefix: str, sequences: int) -> None:
    bounds = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for part, share in zip(("training", "validation", "test"), bounds, strict=True):
        if share is not None and round(share[0] * sequences) == round(share[1] * sequences):
            raise UsageError(
                f"--split {split} leaves no sequence of {prefix} ({sequences} in all) for {part}; "
                f"give that part a larger share{'' if part == 'training' else ', or 0'}"
            )


def _lengths(args: Namespace) -> dict[str, list[int]] | None:
    """Return the numbers of sequences and of document ends by prefix, if a file says them."""
    if not (path := args.per_dataset_sequences_path):
        return None
    try:
        lengths = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--per-dataset-sequences-path {path}: cannot be read: {error}") from error
    if not isinstance(lengths, dict):
        raise UsageError(f"--per-dataset-sequences-path {path}: not a JSON object of prefixes")
    return lengths


def _check_lengths(path: str, lengths: dict[str, list[int]], prefix: str, info: IndexedDatasetInfo) -> None:
    """Check what Megatron then takes for the header of the .idx file."""
    there, here = lengths.get(prefix), [info.sequences, info.documents + 1]
    if there != here:
        raise UsageError(
            f"--per-dataset-sequences-path {path} says {there} of {prefix}, which has {here}, "
            "sequences and document ends: write the file anew, or drop the flag"
        )
    needs = np.dtype(np.uint16 if get_tokenizer().vocab_size <= 1 << 16 else np.int32)  # as Megatron guesses
    if info.dtype != needs:
        raise UsageError(
            f"--per-dataset-sequences-path {path}: {prefix} holds {info.dtype}, which Megatron then reads as "
            f"{needs}, by the size of the tokenizer; drop the flag"
        )


def _prefixes(args: Namespace) -> Iterator[str]:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    for prefixes_and_weights in [blend, *(blend_per_split or [])]:
        if prefixes_and_weights is not None:
            yield from prefixes_and_weights[0]


def predicts_more_tokens_here(args: Namespace, vp_stage: int | None) -> bool:
    """Tell whether this pipeline stage holds multi-token prediction layers."""
    if args.mtp_num_layers is None:
        return False
    config = transformer_config(args)
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def masks_documents(args: Namespace) -> bool:
    """Tell whether attention stays within documents: then every pipeline stage needs the data's masks."""
    return bool(args.reset_attention_mask or args.dataloader_inter_document_masking)


def _reads_data_here(vp_stage: int | None) -> bool:
    args = get_args()
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    if is_first_or_last_pipeline_stage(vp_stage) or masks_documents(args):
        return True
    return predicts_more_tokens_here(args, vp_stage)


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Return the configuration of the datasets that the arguments name, as in Megatron's pretrain_gpt.py."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=_lengths(args),
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        hybrid_context_parallel=False,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def train_valid_test_datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Build the training, validation and test datasets; Megatron's ``train_valid_test_dataset_provider``.

    Parameters
    ----------
    num_samples
        Samples of training, validation and test.
    vp_stage
        The virtual pipeline stage.

    Raises
    ------
    UsageError
        If there are more datasets than files that a process may hold open, several without weights hold
        fewer samples than the run takes, or the order of the samples is not the checkpoint's.
    """
    args = get_args()
    kind = MockGPTDataset if args.mock_data else GPTDataset
    config = dataset_config(args)
    prefixes, limit = set(_prefixes(args)), allow_open_files()
    ordered = [samples_to_order(args, num_samples[0]), *num_samples[1:]]
    config.contents = contents_of(prefixes)
    try:
        datasets = Builder(kind, ordered, partial(_reads_data_here, vp_stage), config).build()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise RankError(
            f"{len(prefixes)} datasets hold about {_FILES_OF_A_DATASET * len(prefixes):,} files open, and "
            f"this machine allows a process {limit:,}: raise the hard limit (`ulimit -Hn`), or merge "
            "datasets (tools/merge_datasets.py)"
        ) from error
    _check_blends(args, datasets, num_samples)
    if not args.mock_data and not args.phase_transition_iterations and vp_stage in (None, 0):
        keep_order(args, datasets[0])
    return [_unless_empty(dataset) for dataset in datasets]


def _check_blends(args: Namespace, datasets: list[Any], num_samples: Sequence[int | None]) -> None:
    """Refuse datasets that end before the run does: Megatron reads several without weights once only."""
    if args.dataloader_type != "single":  # it begins anew
        return
    for part, dataset, samples in zip(("training", "validation", "test"), datasets, num_samples, strict=True):
        if (part == "training" and args.skip_train) or not isinstance(dataset, BlendedDataset):
            continue
        if samples is not None and len(dataset) < samples:
            raise UsageError(
                f"the {len(dataset.datasets)} datasets for {part} hold {len(dataset):,} samples, which "
                f"are read once, as they have no weights, and this run takes {samples:,}; give each a weight "
                "before its path, such as the size of its .bin file, to read them as often as it takes, or "
                f"{'train' if part == 'training' else 'evaluate'} on fewer"
            )


def _unless_empty(dataset: Any) -> Any:
    """Return None for a blend without a sample, as of ``--eval-iters 0``: Megatron's loaders refuse it."""
    return None if isinstance(dataset, BlendedDataset) and not len(dataset) else dataset


train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]
