"""Where the monitor stands in Megatron's training loop, and what the loop evaluates.

The loop finds ``train_step`` and ``training_log`` by name in megatron/training/training.py, so two
functions around them see every iteration begin and end, and one around ``save_checkpoint_and_time`` sees
every checkpoint. ``train_step`` is given the pipeline schedule as an argument: the monitored iterations get
a wrapped one, which ends after ``finalize_model_grads`` and before the optimizer's step.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from megatron.training import training
from megatron.training.datasets.data_samplers import MegatronFullValidationSampler

from megatron_periln.patches.registry import changes

__all__ = [
    "Observer",
    "before_exit",
    "keep_batches_of_validation_and_test_apart",
    "observe",
    "skip_validation",
    "sum_events_with",
    "validate_on_each_sample_once",
]


class Observer(Protocol):
    """Sees the training loop; iterations count from 1, as in Megatron's log."""

    def begin(
        self, iteration: int, forward_backward: Callable[..., Any], model: list[Any], optimizer: Any
    ) -> Callable[..., Any]:
        """See an iteration begin; return the schedule that it runs."""

    def end(
        self, iteration: int, losses: dict[str, Any], grad_norm: Any, learning_rate: float | None
    ) -> None:
        """See an iteration end, before validation and saving.

        ``losses`` are empty but on the last pipeline stage; ``grad_norm`` is that before clipping,
        None where loss scaling skipped the update.
        """

    def before_save(self) -> None:
        """See that a checkpoint is about to be saved."""


@changes(
    "megatron.training.training.train_step",
    "megatron.training.training.training_log",
    "megatron.training.training.save_checkpoint_and_time",
    why="the monitor is to see every iteration, and `megatron.training.pretrain` has no callback for one",
    until=(
        "patches/test_training_loop.py::test_upstream_still_has_no_callback_for_an_iteration",
        "patches/test_training_loop.py::test_upstream_still_calls_what_is_observed_by_name_and_with_these_arguments",
    ),
)
def observe(observer: Observer) -> None:
    """Let ``observer`` see every training iteration of this process."""
    train_step, training_log = training.train_step, training.training_log
    save_checkpoint = training.save_checkpoint_and_time

    def observed_step(
        forward_step: Any,
        data: Any,
        model: list[Any],
        optimizer: Any,
        scheduler: Any,
        config: Any,
        forward_backward: Callable[..., Any],
        iteration: int,
        **kwargs: Any,
    ) -> Any:
        forward_backward = observer.begin(iteration + 1, forward_backward, model, optimizer)
        return train_step(
            forward_step,
            data,
            model,
            optimizer,
            scheduler,
            config,
            forward_backward,
            iteration=iteration,
            **kwargs,
        )

    def observed_log(
        losses: dict[str, Any],
        total_losses: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        loss_scale: float,
        report_memory: bool,
        skipped: int,
        grad_norm: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        observer.end(iteration, losses, grad_norm, learning_rate)
        return training_log(
            losses,
            total_losses,
            learning_rate,
            iteration,
            loss_scale,
            report_memory,
            skipped,
            grad_norm,
            *args,
            **kwargs,
        )

    def observed_save(*args: Any, **kwargs: Any) -> Any:
        observer.before_save()
        return save_checkpoint(*args, **kwargs)

    training.save_checkpoint_and_time = observed_save
    training.train_step, training.training_log = observed_step, observed_log


@changes(
    "megatron.training.training.build_train_valid_test_data_loaders",
    why="it takes a list of no dataset for one, so that a run without data for validation, as of "
    "`--split 100,0,0`, ends in an AssertionError at the first evaluation",
    until="patches/test_training_loop.py::test_upstream_still_evaluates_without_a_dataset",
)
def skip_validation() -> None:
    """Evaluate nothing while training, and the test's data at the end, if there are any."""
    original = training.build_train_valid_test_data_loaders

    def build(provider: Any) -> Any:
        loaders = original(provider)
        training.get_args().do_valid = 0
        return loaders

    training.build_train_valid_test_data_loaders = build


@changes(
    "megatron.training.training.build_train_valid_test_data_loaders",
    "megatron.training.training.build_train_valid_test_data_iterators",
    "megatron.training.training.evaluate_and_print_results",
    why="`--full-validation` puts the number of batches of validation in the place of `--eval-iters`, as a "
    "list with `--multiple-validation-sets`, and the test at the end takes it for its own; of one dataset it "
    "indexes a number, and asks a rank without data for its length; with virtual pipeline stages it takes "
    "stages for datasets; and it reads the data once for every micro-batch of a global batch",
    until="patches/test_training_loop.py::test_upstream_still_loses_the_number_of_batches_of_a_test",
)
def keep_batches_of_validation_and_test_apart() -> None:
    """Have ``--full-validation`` validate on whole datasets, and test with ``--eval-iters`` batches."""
    upstream = _FullValidation(
        training.build_train_valid_test_data_loaders,
        training.build_train_valid_test_data_iterators,
        training.evaluate_and_print_results,
    )
    training.build_train_valid_test_data_loaders = upstream.build_loaders
    training.build_train_valid_test_data_iterators = upstream.build_iterators
    training.evaluate_and_print_results = upstream.evaluate_and_print


class _FullValidation:
    """Calls Megatron's functions with what they misread put right.

    ``test`` is ``--eval-iters``; ``whole`` are the batches of validation, once a stage with data was built.
    """

    def __init__(
        self, loaders: Callable[..., Any], iterators: Callable[..., Any], evaluate: Callable[..., Any]
    ) -> None:
        self._loaders, self._iterators, self._evaluate = loaders, iterators, evaluate
        self.test: int | None = None
        self.whole: int | list[int] | None = None
        self._has_data = False

    def build_loaders(self, provider: Any) -> Any:
        args = training.get_args()
        train, valid, test = self._loaders(provider)
        args.do_test = args.do_test and bool(self.test)
        self._has_data = bool(valid) and valid[0] is not None
        if not self._has_data and not args.multiple_validation_sets:
            valid = None
        return train, valid, test

    def build_iterators(self, provider: Any) -> Any:
        """Build those of a virtual pipeline stage; called once for each of this rank."""
        args = training.get_args()
        if self.test is None:
            self.test = args.eval_iters or 0
        args.eval_iters = self.test
        built = self._iterators(provider)
        if self._has_data:
            self.whole = args.eval_iters
        return built

    def evaluate_and_print(
        self, prefix: str, forward_step: Any, data: Any, *more: Any, **options: Any
    ) -> Any:
        args = training.get_args()
        if prefix.endswith(" on test set"):
            one = {"multiple_validation_sets": False, "validation_set_names": None}
            with _changed(args, full_validation=False, eval_iters=self.test, **one):
                return self._evaluate(prefix, forward_step, data, *more, **options)
        args.eval_iters = _of_the_first_rank(self.whole)
        if args.multiple_validation_sets and args.virtual_pipeline_model_parallel_size is not None:
            data = [list(stages) for stages in zip(*data, strict=True)]
        with _changed(args, full_validation=False, eval_global_batch_size=_samples_at_once(args)):
            return self._evaluate(prefix, forward_step, data, *more, **options)


def _samples_at_once(args: Namespace) -> int:
    """Return a global batch size of one micro-batch a rank, as Megatron counts the batches of validation."""
    if args.virtual_pipeline_model_parallel_size is not None:  # needs several, and reads the data as often
        return int(args.eval_global_batch_size)
    return int(args.eval_micro_batch_size * args.data_parallel_size * args.gtp_weight_remat_size)


def _of_the_first_rank(value: Any) -> Any:
    values = [value]
    torch.distributed.broadcast_object_list(values, 0)
    return values[0]


@contextmanager
def _changed(args: Namespace, **changed: Any) -> Iterator[None]:
    before = {name: getattr(args, name) for name in changed}
    vars(args).update(changed)
    try:
        yield
    finally:
        vars(args).update(before)


@changes(
    "megatron.training.datasets.data_samplers.MegatronFullValidationSampler.__iter__",
    "megatron.training.datasets.data_samplers.MegatronFullValidationSampler.__len__",
    why="where data-parallel ranks don't divide the samples of `--full-validation`, some have fewer than the "
    "number of batches, and go on with samples of the next round: these count twice, at each evaluation "
    "others, so that the loss of the same weights differs from one evaluation to the next",
    until="patches/test_training_loop.py::test_upstream_still_gives_some_ranks_fewer_samples",
)
def validate_on_each_sample_once() -> None:
    """Give ranks without a last sample None, for which Megatron's datasets return one without a loss."""

    def batches(self: Any) -> int:
        return -(-int(self.total_samples) // int(self.data_parallel_size))

    def samples(self: Any) -> Iterator[list[int | None]]:
        for first in range(0, self.total_samples, self.data_parallel_size):
            sample = first + self.data_parallel_rank
            yield [sample if sample < self.total_samples else None]

    MegatronFullValidationSampler.__len__ = batches
    MegatronFullValidationSampler.__iter__ = samples


@changes(
    "megatron.training.training.train_step",
    why="at a loss or gradient that is NaN a step has a checkpoint saved and the run ended: without `--save` "
    "too, a TypeError about paths, and with weights that are NaN themselves. There is no hook to say "
    "otherwise, or what has happened",
    until="patches/test_training_loop.py::test_upstream_still_saves_at_a_nan_wherever_it_may_be",
)
def before_exit(decide: Callable[[int, list[Any], bool, int], tuple[bool, int]]) -> None:
    """Let ``decide`` see on every rank the step with which a run ends, because of what the step gave.

    It is given the iteration, from 1 on, the model, whether the loop is to save a checkpoint, and the status
    with which it is to exit, and returns the latter two.
    """
    train_step = training.train_step

    def last_step(*args: Any, iteration: int, **kwargs: Any) -> Any:
        result = train_step(*args, iteration=iteration, **kwargs)
        losses, skipped, should_checkpoint, should_exit, exit_code, *others = result
        if should_exit:
            should_checkpoint, exit_code = decide(iteration + 1, args[2], should_checkpoint, exit_code)
        return losses, skipped, should_checkpoint, should_exit, exit_code, *others

    training.train_step = last_step


@changes(
    "tensorboard.summary.writer.record_writer.masked_crc32c",
    why="it takes the checksum of an event byte by byte in Python, 0.1 to 0.2 microseconds each: 15 ms for "
    "an event with a scalar of each statistic of 64 layers",
    until="monitor/test_checksums.py::test_upstream_still_sums_byte_by_byte_in_python",
)
def sum_events_with(masked_crc32c: Callable[[bytes, Callable[[bytes], int]], int]) -> None:
    """Take the checksums of TensorBoard's events with a function of the data and TensorBoard's own."""
    # TensorBoard, half a second, is imported by runs that write for it.
    from tensorboard.summary.writer import record_writer

    if not hasattr(record_writer.masked_crc32c, "__wrapped__"):
        original = record_writer.masked_crc32c
        record_writer.masked_crc32c = functools.wraps(original)(lambda data: masked_crc32c(data, original))
