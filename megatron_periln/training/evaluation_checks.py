"""Rules for the batches that evaluation takes while training, which fail at the first one, after hours."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron_periln.rules import Check, Rule

__all__ = ["EVALUATION"]


def _evaluates(args: Namespace) -> bool:
    return bool(args.full_validation or args.eval_iters)


def _has_test(args: Namespace) -> bool:
    share = (args.split or "").split(",")[2:]
    return bool(args.test_data_path or (share and float(share[0])))


def _interleaved_schedule(args: Namespace) -> Iterator[str]:
    """Check the number of micro-batches, as megatron/core/pipeline_parallel/schedules.py does."""
    if not _evaluates(args) or args.virtual_pipeline_model_parallel_size is None:
        return
    count = args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)
    stages = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or stages
    if group > count or 0 < count % group < stages:
        yield (
            f"evaluation has {count} micro-batches (--eval-global-batch-size {args.eval_global_batch_size}, "
            f"--eval-micro-batch-size {args.eval_micro_batch_size}, {args.data_parallel_size} data-parallel "
            f"ranks), which an interleaved pipeline of {stages} stages can't take; give it a multiple of "
            f"{group}"
        )


EVALUATION: tuple[Check, ...] = (
    # What megatron-core 0.19 can do: lists of datasets, without a test, read one sample at a time.
    Rule(
        lambda args: args.full_validation and not args.multiple_validation_sets,
        "--full-validation of one dataset fails in megatron-core; give --multiple-validation-sets too, "
        "one will do",
    ),
    Rule(
        lambda args: args.full_validation and _has_test(args),
        "--full-validation leaves megatron-core without a number of batches for a test, which fails at "
        "the end; give --split with a last share of 0, and no --test-data-path",
    ),
    Rule(
        lambda args: (
            args.full_validation
            and (args.tensor_model_parallel_size > 1 or args.pipeline_model_parallel_size > 1)
            and args.eval_micro_batch_size != 1
        ),
        "--full-validation reads samples one by one, and ranks of tensor or pipeline parallelism would "
        "expect {eval_micro_batch_size}; give --eval-micro-batch-size 1",
    ),
    Rule(
        lambda args: (
            _evaluates(args) and args.tp_comm_overlap and args.eval_micro_batch_size != args.micro_batch_size
        ),
        "--tp-comm-overlap has buffers for --micro-batch-size {micro_batch_size}, and evaluation "
        "would take {eval_micro_batch_size} (--eval-micro-batch-size); make them equal, or drop "
        "--tp-comm-overlap",
    ),
    _interleaved_schedule,
)
"""Where ranks would expect batches of different sizes, or a pipeline can't take so few."""
