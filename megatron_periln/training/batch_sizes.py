"""Global batch sizes that grow: ``--rampup-batch-size`` by way of ``--step-batch-size-schedule``."""

from __future__ import annotations

from argparse import Namespace

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_periln.errors import UsageError

__all__ = ["accept_the_last_size", "check_batch_sizes", "translate_rampup"]


def translate_rampup(args: Namespace) -> list[str]:
    """Turn ``--rampup-batch-size``, which megatron-core ignores, into ``--step-batch-size-schedule``.

    The schedule is that of the megatron-core that read the flag: ``START INCREMENT SAMPLES`` gives
    ``(global_batch_size - START) / INCREMENT`` steps of equally many samples.

    Parameters
    ----------
    args
        Megatron's parsed arguments, before their validation; changed in place.

    Returns
    -------
    list of str
        One line that says what was done; none without the flag.

    Raises
    ------
    UsageError
        For a ramp that does not lead to ``--global-batch-size``, or beside what excludes it.
    """
    if args.rampup_batch_size is None:
        return []
    start, increment, samples = (int(value) for value in args.rampup_batch_size)
    flag = f"--rampup-batch-size {start} {increment} {samples}"
    if args.step_batch_size_schedule is not None:
        raise UsageError(f"{flag} and --step-batch-size-schedule say the same twice; drop one of them")
    if args.decrease_batch_size_if_needed:
        raise UsageError(f"{flag} can't be combined with --decrease-batch-size-if-needed; drop one of them")
    thresholds = _thresholds(flag, start, increment, samples, args.global_batch_size)
    length = args.seq_length
    if length is None:
        raise UsageError(f"{flag} needs --seq-length")
    schedule = " ".join(f"{after * length}:{size}" for after, size in thresholds)
    args.step_batch_size_schedule = schedule
    # Megatron takes either flag alone. The schedule leads to this batch size, in which the iterations of
    # warmup and decay are counted, as they were when Megatron read the ramp.
    args._is_global_batch_size_explicitly_specified = False
    steps = [f"{size} after {after} samples" for after, size in thresholds]
    shown = steps if len(steps) < 5 else [*steps[:2], "...", steps[-1]]
    return [
        f"{flag}, which megatron-core ignores, becomes --step-batch-size-schedule: a global batch size of "
        f"{', '.join(shown)}"
    ]


def accept_the_last_size(args: Namespace) -> list[str]:
    """Let ``--global-batch-size`` name the size that ``--step-batch-size-schedule`` ends with.

    Megatron refuses both together, in its own example of GPT-3 175B as well.

    Parameters
    ----------
    args
        Megatron's parsed arguments, before their validation; changed in place.

    Returns
    -------
    list of str
        One line, if both are given and agree.
    """
    if args.step_batch_size_schedule is None or args.global_batch_size is None:
        return []
    if args.step_batch_size_schedule.rstrip().rpartition(":")[2] != str(args.global_batch_size):
        return []
    args._is_global_batch_size_explicitly_specified = False
    return [
        f"--global-batch-size {args.global_batch_size} is what --step-batch-size-schedule leads to, which "
        "acts; iterations of warmup and decay are counted in it"
    ]


def _thresholds(
    flag: str, start: int, increment: int, samples: int, goal: int | None
) -> list[tuple[int, int]]:
    """Return after how many samples which batch size begins."""
    if goal is None:
        raise UsageError(f"{flag} needs --global-batch-size, to which it leads")
    if start < 1 or increment < 1 or samples < 0 or start > goal or (goal - start) % increment:
        raise UsageError(
            f"{flag} does not lead to --global-batch-size {goal}: give a first size of 1 or more, an "
            "increment that divides what is left, and a number of samples"
        )
    count = (goal - start) // increment
    if count and samples < count:
        raise UsageError(f"{flag}: its {count} increments need {count} samples or more; give more")
    return [
        (-(-step * samples // count) if count else 0, start + step * increment) for step in range(count + 1)
    ]


def check_batch_sizes(args: Namespace, consumed_samples: int) -> None:
    """Check that the batch sizes still to come can be split, which Megatron does when each begins.

    Parameters
    ----------
    args
        Megatron's validated arguments.
    consumed_samples
        What the checkpoint to continue has been trained with, 0 without one.

    Raises
    ------
    UsageError
        Naming the first batch size that can't.
    """
    if args.step_batch_size_schedule is None:
        return
    try:
        steps = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(
            args.step_batch_size_schedule, args.seq_length
        )
    except ValueError as error:
        raise UsageError(f"--step-batch-size-schedule: {error}") from error
    if not steps or steps[0][0] != 0:
        raise UsageError("--step-batch-size-schedule must say the batch size from 0 on, as 0:SIZE")
    ends = [start for start, _ in steps[1:]] + [None]
    micro_batches = args.micro_batch_size * args.data_parallel_size * args.gtp_weight_remat_size
    for (start, size), end in zip(steps, ends, strict=True):
        if end is not None and end <= start:
            raise UsageError(f"--step-batch-size-schedule has two batch sizes after {start} samples")
        if (end is None or end > consumed_samples) and (size < 1 or size % micro_batches):
            raise UsageError(
                f"the global batch size of {size} after {start} samples is not divisible by "
                f"--micro-batch-size times the data-parallel size ({micro_batches}); change the schedule or "
                "one of these"
            )
