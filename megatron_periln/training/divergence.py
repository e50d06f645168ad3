"""A loss or a gradient that is NaN or Inf ends a run with one line: when, what, where, and what to do.

Megatron's rerun state machine repeats such a step. If the value is the same again, it has a checkpoint saved,
from which another GPU is to repeat it once more, and ends the run with status 16; if not, or if that was this
other GPU, with status 17. ``--rerun-mode disabled`` ends it by an error, on the ranks that have met it.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

from megatron_periln.checkpoints.rendezvous import Rendezvous
from megatron_periln.errors import RankError, UsageError
from megatron_periln.patches import training_loop

__all__ = ["Divergence", "DivergenceError"]

_RAISED = re.compile(r"Unexpected result (\S+) \(message='(.*)'\)")
# torch's, of a number that a parameter is to be changed by.
_OVERFLOW = re.compile("converted to type .* without overflow|too large to convert")
_LOGGED = re.compile(r"iteration #\d+")
_LOSS = "the loss is"
_WHAT = (
    (re.compile("in local forward loss"), _LOSS),
    (re.compile(r"in local grad norm for bucket #(\d+)"), r"the gradient norm of bucket \1 is"),
)
_AGAIN = {
    RerunState.RERUNNING_IN_PLACE: ", but not when the step is repeated: the hardware may be at fault",
    RerunState.WILL_RERUN_FROM_CHECKPOINT: ", and again when the step is repeated",
    RerunState.RERUNNING_FROM_CHECKPOINT: "; the lines above say what it is on another GPU",
    RerunState.RERUNNING_AGAIN_FROM_CHECKPOINT: "; to compare it, start again on another GPU",
}
_NO_CHECKPOINT = 17  # Megatron's EXIT_CODE_FAILED_ON_RESULT_VALIDATION


class DivergenceError(UsageError):
    """Training has diverged; ``status`` is what the rank is to end with."""


class Divergence:
    """Sees a run diverge, and ends it so that the ranks tell of it once.

    Parameters
    ----------
    args
        Megatron's and ours, validated.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.message: str | None = None
        training_loop.before_exit(self.decide)
        logging.getLogger(rerun_state_machine.__name__).addFilter(self.correct)

    def decide(
        self, iteration: int, model: list[Any], should_checkpoint: bool, exit_code: int
    ) -> tuple[bool, int]:
        """See on every rank that an iteration is the last; return whether it is saved, and the exit status.

        Weights that are not finite are not saved: the run would go on from them, not from the last good ones.
        """
        machine = get_rerun_state_machine()
        mine = None
        if machine.rerun_requested and machine.failed_validation_call is not None:
            what = _what(machine.failed_validation_call.caller.message, machine.initial_result)
            what = f"{what} on rank {self.args.rank} ({os.uname().nodename})"
            mine = (not what.startswith(_LOSS), self.args.rank, what)  # a gradient may be of another's loss
        finite = all(bool(each.isfinite().all()) for chunk in model for each in chunk.parameters())
        reports: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(reports, (mine, finite))
        found = sorted(report for report, _ in reports if report is not None)
        finite = all(fine for _, fine in reports)
        if should_checkpoint and not (finite and self.args.save):
            should_checkpoint, exit_code = False, _NO_CHECKPOINT
        others = f", with {len(found) - 1} more ranks" if len(found) > 1 else ""
        first = found[0][2] if found else "a result is not what it should be"
        self.message = self._line(
            iteration, f"{first}{others}{_AGAIN.get(machine.state, '')}", finite, should_checkpoint
        )
        return should_checkpoint, exit_code

    @contextmanager
    def in_one_line(self) -> Iterator[None]:
        """Turn the end of a run that has diverged into a `DivergenceError`.

        Raises
        ------
        DivergenceError
            On every rank, or, with ``--rerun-mode disabled``, on those that have met it.
        """
        try:
            yield
        except SystemExit as end:
            if self.message is None:
                raise
            error = DivergenceError(self.message)
            error.status = end.code if isinstance(end.code, int) else 1
            raise error from None
        except (RuntimeError, OverflowError) as error:
            raised = _RAISED.search(str(error))
            overflows = _OVERFLOW.search(str(error))
            if raised is None and overflows is None:
                raise
            functions = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
            found = _what(raised[2], raised[1]) if raised else "the optimizer's step is beyond fp32"
            what = f"{found} on rank {self.args.rank} ({os.uname().nodename})"
            where = " in the evaluation after it" if "evaluate" in functions else ""
            message = self._line(self.args.curr_iteration + 1, f"{what}{where}", True, False)
            alone = Rendezvous(self.args).speaks_for_the_first()
            raise (RankError if alone else DivergenceError)(message) from error

    def correct(self, record: logging.LogRecord) -> bool:
        """Keep from the log, which counts iterations otherwise, what is told in the end."""
        text = record.getMessage()
        told = record.levelno >= logging.ERROR and ("message='found " in text or text.startswith("Rank "))
        if told or "exiting now" in text.lower():
            return False
        now = getattr(self.args, "curr_iteration", 0) + 1
        record.msg, record.args = _LOGGED.sub(f"iteration #{now}", text), ()
        return True

    def _line(self, iteration: int, what: str, finite: bool, saved: bool) -> str:
        if saved:
            kept = f"the weights before it are saved: iteration {iteration - 1} of --save {self.args.save}"
        elif not finite:
            kept = "weights are not finite any more, and not saved: go on from an earlier checkpoint"
        else:
            kept = "it is not saved"
        return (
            f"iteration {iteration}: {what}; {kept}. If training has diverged: give a smaller --lr (now "
            f"{self.args.lr:g}), a longer --lr-warmup-iters, a smaller --clip-grad, or another "
            f"--norm-placement than {self.args.norm_placement}; --monitor-layers with "
            "--no-check-for-nan-in-loss-and-grad shows in which layer it begins"
        )


def _what(message: str, value: Any) -> str:
    for pattern, words in _WHAT:
        if match := pattern.search(message):
            return f"{match.expand(words)} {float(value):g}"
    return f"{message}: {float(value):g}"
