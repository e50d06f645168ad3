"""Checks of the batches that evaluation takes while training, which fail at the first one, after hours."""

from __future__ import annotations

from argparse import Namespace

from megatron_periln.errors import UsageError

__all__ = ["check_evaluation"]


def check_evaluation(args: Namespace) -> None:
    """Check the batch sizes of evaluation, once Megatron has validated the arguments.

    Raises
    ------
    UsageError
        If ranks would expect batches of different sizes, or a pipeline can't take so few.
    """
    if not (args.full_validation or args.eval_iters):
        return
    if args.full_validation:
        _check_full_validation(args)
    if args.tp_comm_overlap and args.eval_micro_batch_size != args.micro_batch_size:
        raise UsageError(
            f"--tp-comm-overlap has buffers for --micro-batch-size {args.micro_batch_size}, and evaluation "
            f"would take {args.eval_micro_batch_size} (--eval-micro-batch-size); make them equal, or drop "
            "--tp-comm-overlap"
        )
    if args.virtual_pipeline_model_parallel_size is not None:
        _check_interleaved_schedule(args)


def _check_full_validation(args: Namespace) -> None:
    """Check what megatron-core 0.19 can do: lists of datasets, without a test, read one sample at a time."""
    if not args.multiple_validation_sets:
        raise UsageError(
            "--full-validation of one dataset fails in megatron-core; give --multiple-validation-sets too, "
            "one will do"
        )
    share = (args.split or "").split(",")[2:]
    if args.test_data_path or (share and float(share[0])):
        raise UsageError(
            "--full-validation leaves megatron-core without a number of batches for a test, which fails at "
            "the end; give --split with a last share of 0, and no --test-data-path"
        )
    sends = args.tensor_model_parallel_size > 1 or args.pipeline_model_parallel_size > 1
    if sends and args.eval_micro_batch_size != 1:
        raise UsageError(
            "--full-validation reads samples one by one, and ranks of tensor or pipeline parallelism would "
            f"expect {args.eval_micro_batch_size}; give --eval-micro-batch-size 1"
        )


def _check_interleaved_schedule(args: Namespace) -> None:
    """Check the number of micro-batches, as megatron/core/pipeline_parallel/schedules.py does."""
    count = args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)
    stages = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or stages
    if group > count or 0 < count % group < stages:
        raise UsageError(
            f"evaluation has {count} micro-batches (--eval-global-batch-size {args.eval_global_batch_size}, "
            f"--eval-micro-batch-size {args.eval_micro_batch_size}, {args.data_parallel_size} data-parallel "
            f"ranks), which an interleaved pipeline of {stages} stages can't take; give it a multiple of "
            f"{group}"
        )
