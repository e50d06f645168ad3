"""Rules for the data and batches that evaluation takes while training: they fail at the first one."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron.training.utils import get_blend_and_blend_per_split

from megatron_periln.data.split import is_divided, names_parts, parts_with_data, shares
from megatron_periln.rules import Check, Rule

__all__ = ["EVALUATION", "why_no_validation"]


def why_no_validation(args: Namespace) -> str | None:
    """Return why there is nothing to evaluate while training, although ``--eval-iters`` asks for it."""
    if not _asked_for(args) or parts_with_data(args)["valid"]:
        return None
    if is_divided(args):
        return f"--split {args.split} leaves nothing for validation"
    file = args.per_split_data_args_path
    return f"{file} names nothing for valid" if file else "--valid-data-path is not given"


def _asked_for(args: Namespace) -> bool:
    return bool(args.full_validation or args.eval_iters)


def _evaluates(args: Namespace) -> bool:
    parts = parts_with_data(args)
    return _asked_for(args) and (parts["valid"] or parts["test"])


def _weighs_validation(args: Namespace) -> bool:
    """Tell whether datasets of validation are given as ``WEIGHT PATH WEIGHT PATH ...``."""
    if not is_divided(args) and not names_parts(args):
        return False
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    validation = blend_per_split[1] if blend_per_split else blend
    return validation is not None and validation[1] is not None


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
    Rule(
        lambda args: args.split is not None and shares(args.split) is None,
        "--split {split} is not three shares such as 969,30,1",
    ),
    Rule(
        lambda args: args.data_args_path is not None and args.split is None,
        "--data-args-path needs --split; give the shares of training, validation and test, such as 969,30,1",
    ),
    Rule(
        lambda args: args.split is not None and names_parts(args),
        "--split divides --data-path; drop it, or --train-data-path, --valid-data-path, --test-data-path and "
        "--per-split-data-args-path",
    ),
    Rule(
        lambda args: not args.skip_train and not parts_with_data(args)["train"],
        "there are no data to train on; give --split with a first share, or --train-data-path",
    ),
    Rule(
        lambda args: args.full_validation and not parts_with_data(args)["valid"],
        "--full-validation has nothing to evaluate; give --split with a second share or --valid-data-path, "
        "or drop it",
    ),
    # What megatron-core 0.19 can do: it reads each sample of a dataset, one at a time.
    Rule(
        lambda args: args.full_validation and _weighs_validation(args),
        "--full-validation reads all of every dataset, which leaves no use for weights; give the paths "
        "alone, or drop it",
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
