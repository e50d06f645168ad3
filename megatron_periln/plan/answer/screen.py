"""A plan in one screen of text: memory as bars and numbers, time, communication, what would make it fit."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from megatron_periln.plan.answer.fit import Remedy
from megatron_periln.plan.answer.planned import Need, Planned
from megatron_periln.plan.answer.units import bar, columns, gib, seconds, short, traffic_bytes

__all__ = ["comparison", "comparison_rows", "parts_of", "refusal", "screen", "verdict"]

_WIDTH = 56
_SYMBOLS = "WGMOALTEPRSUVXYZ"  # of whatever else there is; the allowances have their own
_OF_ALLOWANCES = {"CUDA context": "C", "NCCL": "N", "fragmentation": "F"}
_MOST_RANKS = 6
_NOTE = "(again: recomputed; waits: for other stages; sent, away: by the busiest rank, to other nodes)"


def screen(planned: Planned, remedies: Sequence[Remedy] | None = None) -> str:
    """Return the answer; ``remedies`` are those of a run that doesn't fit, None if not looked for."""
    sections = [
        _title(planned),
        "\n".join(_bars(planned)),
        "\n".join(_consists(planned)),
        "\n".join([verdict(planned), *_remedies(planned, remedies)]),
        "\n".join(_time(planned)),
        "\n".join(_traffic(planned)),
    ]
    return "\n\n".join(filter(None, sections))


def _title(planned: Planned) -> str:
    args, machine = planned.args, planned.machine
    model = f"{short(planned.checkpoint.parameters)} parameters, {args.norm_placement}"
    gpus = f"{args.world_size:,} x {machine.gpu.name} in nodes of {machine.node}"
    batch = f"{planned.microbatches:,} microbatches of {args.micro_batch_size}"
    return f"{model}, {gpus}: {planned.layout}, {batch}, recomputes {planned.recomputation}"


def parts_of(planned: Planned) -> list[str]:
    """Return what the memory of any rank consists of, in order."""
    names = [name for need in planned.needs for name, count in need.memory.items() if count]
    return list(dict.fromkeys(names))


def _shown(planned: Planned) -> list[Need]:
    """Return the needs to show: of many, the first ones, the fullest and the last."""
    needs = list(planned.needs)
    if len(needs) <= _MOST_RANKS:
        return needs
    kept = {*range(_MOST_RANKS - 2), needs.index(planned.fullest), len(needs) - 1}
    return [need for index, need in enumerate(needs) if index in kept]


def _bars(planned: Planned) -> list[str]:
    gpu = planned.machine.gpu
    symbols = _symbols(parts_of(planned))
    full = max(gpu.memory, planned.fullest.bytes)
    shown = _shown(planned)
    rows = [
        [
            need.rank.name,
            f"{need.rank.ranks_alike:,}",
            bar([(symbols[name], count) for name, count in need.memory.items()], gpu.memory, _WIDTH, full),
            gib(need.bytes),
            "fits" if need.bytes <= gpu.memory else "DOES NOT FIT",
        ]
        for need in shown
    ]
    hidden = len(planned.needs) - len(shown)
    legend = textwrap.fill(", ".join(f"{symbol} {name}" for name, symbol in symbols.items()), 100)
    head = ["stage", "ranks", f"| is {gib(gpu.memory)} GiB", "GiB", ""]
    lines = columns([head, *rows], left=3)
    return [*lines, *([f"({hidden} more stages need less)"] if hidden else []), legend]


def _symbols(names: Sequence[str]) -> dict[str, str]:
    """Return a letter for each part: its first one, if that is free."""
    symbols = {name: _OF_ALLOWANCES[name] for name in names if name in _OF_ALLOWANCES}
    for name in names:
        if name not in symbols:
            wanted = [letter for letter in (*name.upper(), *_SYMBOLS) if letter.isalpha()]
            symbols[name] = next(letter for letter in wanted if letter not in symbols.values())
    return {name: symbols[name] for name in names}


def _consists(planned: Planned) -> list[str]:
    names = parts_of(planned)
    shown = _shown(planned)
    head = ["GiB", *(need.rank.name for need in shown)]
    rows = [[name, *(gib(need.memory.get(name, 0)) for need in shown)] for name in names]
    flights = [" + ".join(map(str, need.rank.microbatches_in_flight)) or "-" for need in shown]
    return columns([head, *rows, ["microbatches in flight", *flights]])


def verdict(planned: Planned) -> str:
    """Return whether it fits, in one line."""
    fullest, gpu = planned.fullest, planned.machine.gpu
    what = f"{fullest.rank.name} needs {gib(fullest.bytes)} GiB of {gpu.name}'s {gib(gpu.memory)}"
    if planned.fits:
        return f"It fits: {what}; {gib(planned.left)} GiB are left."
    return f"It does not fit: {what}, {gib(-planned.left)} GiB too much."


def refusal(planned: Planned, remedies: Sequence[Remedy] | None) -> str:
    """Return the one line that a run which doesn't fit ends in."""
    gpu, fullest = planned.machine.gpu, planned.fullest
    what = f"{fullest.rank.name} needs {gib(fullest.bytes)} GiB of {gpu.name}'s {gib(gpu.memory)} GiB"
    remedy = "; give more GPUs, or larger ones"
    if remedies is None:
        remedy = "; without --no-changes the plan looks for what would make it fit"
    elif remedies:
        remedy = f"; give {' '.join(remedies[0].flags)}"
    return f"the run does not fit: {what} (rank {fullest.rank.rank}, {planned.layout}){remedy}"


def _remedies(planned: Planned, remedies: Sequence[Remedy] | None) -> list[str]:
    if planned.fits or remedies is None:
        return []
    if not remedies:
        return ["None of the changes that were tried makes it fit, nor do two of them: it needs more GPUs."]
    rows = [
        [" ".join(remedy.flags), f"{gib(remedy.planned.fullest.bytes)} GiB", f"{remedy.step_time - 1:+.1%}"]
        for remedy in remedies
    ]
    return [
        "It would with one of these, each planned as the run itself:",
        *columns([["", "", "step time"], *rows]),
    ]


def _time(planned: Planned) -> Iterable[str]:
    timing, checkpoint, gpu = planned.timing, planned.checkpoint, planned.machine.gpu
    again = f" and {timing.recomputed:.0%} again by recomputation" if timing.recomputed else ""
    step = f"a step: {short(timing.tokens)} tokens, {short(timing.flops)}FLOP{again}"
    if timing.step_seconds is not None and gpu.bf16 is not None:
        step += f", {seconds(timing.step_seconds)} at {timing.mfu:.0%} of {short(gpu.bf16)}FLOP/s a GPU"
    yield step
    if planned.args.pipeline_model_parallel_size > 1:
        alike = f"{timing.ideal_bubble:.1%} were all stages equally long"
        yield f"waiting for other stages: {timing.bubble:.1%} of a step ({alike})"
    run = "the run: the flags give no --train-iters"
    if timing.steps is not None:
        run = f"the run: {timing.steps:,} steps, {short(timing.steps * timing.tokens)} tokens"
        if timing.step_seconds is not None:
            run += f", {seconds(timing.steps * timing.step_seconds)}"
    yield run
    yield (
        f"a checkpoint: {traffic_bytes(checkpoint.bytes)}, written in {seconds(checkpoint.seconds)} at "
        f"{traffic_bytes(checkpoint.bandwidth)}/s"
    )


def _traffic(planned: Planned) -> list[str]:
    need = max(planned.needs, key=lambda need: sum(each.seconds for each in need.traffic))
    if not need.traffic:
        return []
    rows = [
        [
            each.group.kind,
            f"{len(each.group.ranks):,}",
            {"both": "NVLink, network"}.get(each.group.links, each.group.links),
            traffic_bytes(each.bytes),
            traffic_bytes(each.over_network),
            seconds(each.seconds),
        ]
        for each in need.traffic
    ]
    head = ["sent in a step", "ranks", "over", "bytes", "leave the node", "if alone"]
    return [*columns([head, *rows]), f"(a rank of {need.rank.name}, rank {need.rank.rank})"]


def comparison_rows(planned: Sequence[Planned]) -> list[list[str]]:
    """Return a head, and a row for each layout."""
    head = [
        "",
        "layout",
        "GiB",
        "left",
        "fits",
        "again",
        "waits",
        "s/step",
        "days",
        "checkpoint",
        "sent",
        "away",
    ]
    return [head, *(_row(each) for each in planned)]


def _row(planned: Planned) -> list[str]:
    timing = planned.timing
    sent = max(planned.needs, key=lambda need: sum(traffic.bytes for traffic in need.traffic)).traffic
    return [
        planned.label,
        planned.layout,
        gib(planned.fullest.bytes),
        gib(planned.left),
        "yes" if planned.fits else "NO",
        f"{timing.recomputed:.0%}",
        f"{timing.bubble:.1%}",
        f"{timing.step_seconds:.3g}" if timing.step_seconds is not None else "-",
        f"{timing.days:.3g}" if timing.days is not None else "-",
        traffic_bytes(planned.checkpoint.bytes),
        traffic_bytes(sum(traffic.bytes for traffic in sent)),
        traffic_bytes(sum(traffic.over_network for traffic in sent)),
    ]


def comparison(planned: Sequence[Planned], refused: Sequence[str]) -> str:
    """Return one table of several layouts, and a line for each that is refused."""
    lines = [*columns(comparison_rows(planned), left=2), _NOTE] if planned else []
    return "\n".join([*lines, *refused])
