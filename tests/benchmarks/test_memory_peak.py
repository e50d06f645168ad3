"""Which allocations were alive at the peak."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def memory_peak(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import memory_peak  # from the folder that was prepended

    yield memory_peak
    del sys.modules["memory_peak"]


def event(action, address, size, *lines):
    frames = [{"filename": path, "line": line, "name": "f"} for path, line in lines]
    return {"action": action, "addr": address, "size": size, "frames": frames}


LOGITS = (("/site/torch/_ops.py", 3), ("/site/megatron/core/loss.py", 7))
KEPT = (("/site/megatron/core/layer.py", 9),)


def test_what_is_alive_at_the_peak_by_line_and_size(memory_peak):
    events = [
        event("free_completed", 9, 50),  # of before
        event("segment_alloc", 1, 1000),
        event("alloc", 1, 10, *KEPT),
        event("alloc", 2, 60, *LOGITS),
        event("free_requested", 2, 60),
        event("free_completed", 2, 60),
        event("alloc", 2, 10, *KEPT),
        event("alloc", 3, 40, *LOGITS),
        event("alloc", 4, 40, *LOGITS),  # 100: the peak
        event("free_completed", 3, 40),
        event("alloc", 5, 30),
        event("free_completed", 4, 40),
    ]
    held = memory_peak.held_at_peak(events)
    assert [(each.line, each.size, each.count) for each in held] == [
        ("megatron/core/loss.py:7 f", 40, 2),
        ("megatron/core/layer.py:9 f", 10, 2),
    ]


def test_a_peak_at_the_end(memory_peak):
    events = [event("alloc", 1, 10), event("free_completed", 1, 10), event("alloc", 2, 30)]
    (held,) = memory_peak.held_at_peak(events)
    assert (held.line, held.size, held.count) == ("(no line of Python)", 30, 1)
    assert memory_peak.held_at_peak([]) == []
