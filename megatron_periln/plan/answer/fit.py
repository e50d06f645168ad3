"""What would make a run fit: each change planned as the run itself, and what it costs in step time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_periln.errors import UsageError
from megatron_periln.plan.answer.changes import applied
from megatron_periln.plan.answer.planned import Planned

__all__ = ["Remedy", "find_remedies", "step_time"]

_TOLD = 5
_PAIRED = 3  # of the single changes that save most


@dataclass(frozen=True)
class Remedy:
    """A change that was planned.

    Attributes
    ----------
    flags
        What it puts in.
    planned
        The run with it.
    step_time
        A step's, over that of the run as it was.
    """

    flags: tuple[str, ...]
    planned: Planned
    step_time: float


def find_remedies(
    flags: Sequence[str], planned: Planned, plan: Callable[[Sequence[str]], Planned]
) -> list[Remedy]:
    """Return changes after which the run fits, the cheapest first.

    Each is tried by itself. If none is enough, the three that save most are each tried with every other.

    Parameters
    ----------
    flags
        Of the run.
    planned
        The run, which does not fit.
    plan
        Plans other flags in the same way.
    """
    single = _try(planned, [(put, whole) for put, whole in applied(flags, planned.args)], plan)
    fitting = [remedy for remedy, _ in single if remedy.planned.fits]
    if not fitting:
        best = sorted(single, key=lambda each: -each[0].planned.left)[:_PAIRED]
        pairs = {
            tuple(sorted((*first.flags, "", *put))): ([*first.flags, *put], both)
            for first, whole in best
            for put, both in applied(whole, first.planned.args)
            if put[0] not in first.flags
        }
        fitting = [remedy for remedy, _ in _try(planned, list(pairs.values()), plan) if remedy.planned.fits]
    return sorted(fitting, key=lambda remedy: remedy.step_time)[:_TOLD]


def _try(
    before: Planned,
    changed: Sequence[tuple[Sequence[str], Sequence[str]]],
    plan: Callable[[Sequence[str]], Planned],
) -> list[tuple[Remedy, Sequence[str]]]:
    """Return what came of each change, with its flags; those that Megatron refuses are left out."""
    found = []
    for put, flags in changed:
        try:
            planned = plan(flags)
        except UsageError:
            continue
        found.append((Remedy(tuple(put), planned, step_time(before, planned)), flags))
    return found


def step_time(before: Planned, after: Planned) -> float:
    """Return how long a step of ``after`` takes, over one of ``before``.

    The MFU that is given is that of ``before``. What of its step is neither waiting for other stages nor
    sending is computing, which recomputation lengthens; matrix products are taken to be as fast in smaller
    pieces. Tensor, expert and context parallelism send while nothing else is done; data parallelism too,
    unless it is overlapped.
    """
    total = before.timing.step_seconds
    if total is None:
        return _factor(after) / _factor(before)
    sending = min(_exposed(before), total / 2)
    computing = (total - sending) / _factor(before)
    return (computing * _factor(after) + _exposed(after)) / (computing * _factor(before) + _exposed(before))


def _factor(planned: Planned) -> float:
    """Return how much longer than its plain operations a step computes and waits."""
    return (1 + planned.timing.recomputed) / (1 - planned.timing.bubble)


def _exposed(planned: Planned) -> float:
    """Return the seconds in which a rank sends and does nothing else: the longest of all kinds'."""
    hidden = {"PP", "embedding"} | ({"DP", "expert DP"} if planned.args.overlap_grad_reduce else set())
    return max(
        sum(traffic.seconds for traffic in need.traffic if traffic.group.kind not in hidden)
        for need in planned.needs
    )
