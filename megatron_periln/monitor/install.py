"""The monitor of a training run: what ``--monitor-layers`` installs."""

from __future__ import annotations

import atexit
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size

from megatron_periln.errors import UsageError
from megatron_periln.monitor.alerts import STOPS, Alert, Watch
from megatron_periln.monitor.collector import Collector
from megatron_periln.monitor.gradients import count_parameters
from megatron_periln.monitor.record import RunRecord
from megatron_periln.monitor.tensorboard import Board
from megatron_periln.norms.arguments import placement_of
from megatron_periln.patches import training_loop
from megatron_periln.version import __version__

__all__ = ["RunMonitor", "install"]


def install(args: Namespace) -> None:
    """Monitor the training of this process, on every rank of the run.

    Parameters
    ----------
    args
        Megatron's, checked by `megatron_periln.monitor.settings.check_monitor`.
    """
    monitor = RunMonitor(args)
    training_loop.observe(monitor)
    atexit.register(monitor.close)


class RunMonitor:
    """Collects on every rank, writes on the last, where Megatron has the loss and its TensorBoard writer.

    Every iteration is recorded with its loss; the layers in the first one, every
    ``--monitor-interval``, and the last. A run that resumes opens its record at the iteration it
    resumes from.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.writes = args.rank == args.world_size - 1
        self.collector = Collector(args.monitor_layers)
        self.record: RunRecord | None = None
        self.watch, self.board = watch(args), Board()
        self.iteration: int | None = None
        self.started = 0.0

    def is_due(self, iteration: int) -> bool:
        """Tell whether the layers are recorded in ``iteration``."""
        return iteration in (1, self.args.train_iters) or iteration % self.args.monitor_interval == 0

    def begin(
        self, iteration: int, forward_backward: Callable[..., Any], model: list[Any], optimizer: Any
    ) -> Callable[..., Any]:
        """See an iteration begin; return the schedule that it runs."""
        if self.iteration is None or iteration <= self.iteration:  # the latter after a restart in process
            self._open(model)
        self.iteration, self.started = iteration, time.perf_counter()
        if not self.is_due(iteration):
            return forward_backward
        return self.collector.wrap(forward_backward, model, optimizer)

    def _open(self, model: list[Any]) -> None:
        """Open the record on the last rank; an error ends all of them.

        The checkpoint's iteration is Megatron's ``args.iteration``: what begins first may be later, for
        ``--iterations-to-skip``.
        """
        self.close()
        about = header(self.args, count_parameters(model))
        error: list[str | None] = [None]
        if self.writes:
            try:
                path = Path(self.args.monitor_file)
                self.record = RunRecord.open(path, about, resume_from=self.args.iteration)
                self.watch = watch(self.args)
                self.watch.replay(path)
            except UsageError as mistake:
                error = [str(mistake)]
        torch.distributed.broadcast_object_list(error, src=self.args.world_size - 1)
        if error[0] is not None:
            raise UsageError(error[0])

    def end(
        self, iteration: int, losses: dict[str, Any], grad_norm: Any, learning_rate: float | None
    ) -> None:
        """See an iteration end: write it, and stop the run if an alert says so."""
        alerts = self.write(iteration, losses, grad_norm, learning_rate) if self.writes else []
        self.collector.sums = None
        if self.args.monitor_stop_on is not None:
            self._stop_if(any(alert.kind in STOPS[self.args.monitor_stop_on] for alert in alerts))

    def write(
        self, iteration: int, losses: dict[str, Any], grad_norm: Any, learning_rate: float | None
    ) -> list[Alert]:
        """Write what an iteration has, and the alerts that it raises, which are returned."""
        assert self.record is not None
        loss, grad_norm = _number(losses.get("lm loss")), _number(grad_norm)
        self.record.step(
            iteration,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=_number(learning_rate),
            tokens=get_current_global_batch_size() * self.args.seq_length,
            seconds=time.perf_counter() - self.started,
        )
        alerts = self.watch.step(iteration, loss, grad_norm)
        if self.collector.sums is not None:
            layers = self.collector.layers
            statistics = self.collector.sums.values(layers)
            self.record.layers(iteration, layers, statistics)
            self.board.layers(iteration, layers, statistics, last=iteration == self.args.train_iters)
            alerts = alerts + self.watch.layers(iteration, layers, statistics)
        for alert in alerts:
            self.record.alert(iteration, alert.kind, alert.message, layer=alert.layer, value=alert.value)
            self.board.alert(iteration, alert.message)
            print(f"monitor: iteration {iteration}: {alert.message}", flush=True)
        return alerts

    def _stop_if(self, here: bool) -> None:
        """End the run on all ranks if the writer says so, the way ``--exit-interval`` ends it.

        Megatron's loop then saves a checkpoint, unless it just has, and exits.
        """
        stop = torch.tensor(float(here), device="cuda")
        torch.distributed.all_reduce(stop, op=torch.distributed.ReduceOp.MAX)
        if stop.item():
            self.args.exit_interval = 1

    def before_save(self) -> None:
        """See that a checkpoint is about to be saved: it must not know more than the record."""
        if self.record is not None:
            self.record.sync()

    def close(self) -> None:
        """Close the record."""
        if self.record is not None:
            self.record.close()
            self.record = None


def header(args: Namespace, parameters: int) -> dict[str, Any]:
    """Return what a record says of its run (`megatron_periln.monitor.lines.HEADER`)."""
    return {
        "version": __version__,
        "name": Path(args.monitor_file).absolute().parent.name,
        "placement": args.norm_placement,
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "parameters": parameters,
        "flags": dict(sorted(vars(args).items())),
        "started": time.time(),
    }


def watch(args: Namespace) -> Watch:
    """Return what raises this run's alerts."""
    hybrid = args.hybrid_layer_pattern is not None
    return Watch(
        initial_weight=placement_of(args).initial_output_weight(args.num_layers, hybrid),
        skips_overflow=args.fp16 and args.loss_scale is None,
    )


def _number(value: Any) -> float | None:
    """Return a number, or a tensor of one, as a float."""
    return None if value is None else float(value)
