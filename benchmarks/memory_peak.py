"""What a GPU's memory holds when it holds the most: allocations by the line of Python that asked for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Held", "held_at_peak", "print_peak", "record"]

_MOST_EVENTS = 1_000_000


@dataclass(frozen=True)
class Held:
    """Allocations of one size by one line that were alive at the peak."""

    line: str
    size: int
    count: int


def record(step: Callable[[], Any]) -> list[Mapping[str, Any]]:
    """Run ``step``; return what the GPU's allocator did meanwhile, in order."""
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MOST_EVENTS)
    try:
        step()
        torch.cuda.synchronize()
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return snapshot["device_traces"][torch.cuda.current_device()]


def held_at_peak(events: Iterable[Mapping[str, Any]]) -> list[Held]:
    """Return what was allocated since the first event and alive at the peak, the largest sums first."""
    alive: dict[int, Mapping[str, Any]] = {}
    total, most, grows = 0, 0, False
    at_peak: list[Mapping[str, Any]] = []
    for event in events:
        if event["action"] == "alloc":
            alive[event["addr"]] = event
            total += event["size"]
            if total > most:
                most, grows = total, True
        elif event["action"] == "free_completed" and (freed := alive.get(event["addr"])):
            if grows:
                at_peak, grows = list(alive.values()), False
            del alive[event["addr"]]
            total -= freed["size"]
    if grows:
        at_peak = list(alive.values())
    counts: dict[tuple[str, int], int] = defaultdict(int)
    for event in at_peak:
        counts[_line(event.get("frames", ())), event["size"]] += 1
    held = [Held(line, size, count) for (line, size), count in counts.items()]
    return sorted(held, key=lambda each: -each.size * each.count)


def _line(frames: Iterable[Mapping[str, Any]]) -> str:
    """Return the innermost line that is not torch's own; the autograd engine has none."""
    for frame in frames:
        path = str(frame["filename"])
        if "/torch/" not in path and path.endswith(".py"):
            return f"{'/'.join(path.split('/')[-3:])}:{frame['line']} {frame['name']}"
    return "(no line of Python)"


def print_peak(held: list[Held], lines: int = 15) -> None:
    """Print a line a kind of allocation."""
    total = sum(each.size * each.count for each in held)
    print(f"\n{total / 1e9:.2f} GB at the peak, beyond what was there before the step:")
    for each in held[:lines]:
        print(f"{each.size * each.count / 1e9:>8.3f} GB  {each.count:>4} x {each.size:>12}  {each.line}")
