"""``torch.cuda`` as seen by a program whose CUDA device is the CPU.

One device, always synchronous: streams and events have nothing to wait for, memory statistics are
the process's, and the device's random generator is the CPU's. A name that is not mapped here
fails loudly, through ``torch.cuda._lazy_init``.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_periln.patches.registry import changes

__all__ = ["install", "surface"]

_GENERATOR = torch.default_generator


class Stream:
    """A stream of a device on which everything is already done."""

    device = torch.device("cpu")
    device_index = stream_id = cuda_stream = priority = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None:
        """Return at once."""

    def wait_stream(self, stream: Stream) -> None:
        """Return at once."""

    def wait_event(self, event: Event) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Tell that nothing is pending."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record ``event``, or a new one, now."""
        event = event or Event()
        event.record()
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """A point in time."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Take the time."""
        self.seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Tell that the event has passed."""
        return True

    def synchronize(self) -> None:
        """Return at once."""

    def elapsed_time(self, end: Event) -> float:
        """Return the milliseconds from this event to ``end``."""
        return (end.seconds - self.seconds) * 1e3


class _Guard(contextlib.nullcontext[None]):
    """``torch.cuda.device``, ``torch.cuda.stream``: there is one of each."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def _nothing(*_: Any, **__: Any) -> None: ...


def _unmapped(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "a CUDA function without a CPU counterpart was called under --device cpu; "
        "the traceback names it (megatron_periln/cpu/cuda_surface.py maps those that have one)"
    )


def _resident_bytes(device: Any = None) -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_resident_bytes(device: Any = None) -> int:
    # The system counts the two apart, and the peak now and then a little behind what is resident.
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, _resident_bytes())


def _memory_stats(device: Any = None) -> dict[str, int]:
    now = _resident_bytes()
    peak = max(now, _peak_resident_bytes())
    return defaultdict(
        int,
        {
            f"{kind}_bytes.all.{when}": value
            for kind in ("allocated", "reserved")
            for when, value in (("current", now), ("peak", peak))
        },
    )


def _properties(device: Any = None) -> types.SimpleNamespace:
    total = resource.getpagesize() * os.sysconf("SC_PHYS_PAGES")
    return types.SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=total, multi_processor_count=os.cpu_count(), uuid="cpu"
    )


def _memory_info(device: Any = None) -> tuple[int, int]:
    total = _properties().total_memory
    return total - _resident_bytes(), total


def surface() -> dict[str, Any]:
    """Return what takes the place of each name of ``torch.cuda``."""
    stream = Stream()
    constants: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "_is_in_bad_fork": False,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "cpu",
        "get_device_capability": (8, 0),
        "current_stream": stream,
        "default_stream": stream,
        "utilization": 0,
        "temperature": 0,
        "power_draw": 0,
        "clock_rate": 0,
    }
    nothing = [
        "init",
        "synchronize",
        "set_device",
        "set_stream",
        "empty_cache",
        "ipc_collect",
        "check_error",
        "reset_peak_memory_stats",
        "reset_max_memory_allocated",
        # torch.manual_seed seeds every device; the CPU's generator it has seeded already.
        "manual_seed_all",
        "seed",
        "seed_all",
    ]
    functions: dict[str, Any] = {
        "_lazy_init": _unmapped,
        "_lazy_call": lambda function, **_: function(),
        "get_device_properties": _properties,
        "mem_get_info": _memory_info,
        "memory_stats": _memory_stats,
        "memory_allocated": _resident_bytes,
        "memory_reserved": _resident_bytes,
        "device_memory_used": _resident_bytes,
        "max_memory_allocated": _peak_resident_bytes,
        "max_memory_reserved": _peak_resident_bytes,
        "memory_snapshot": lambda *_, **__: [],
        "cudart": lambda: types.SimpleNamespace(cudaProfilerStart=_nothing, cudaProfilerStop=_nothing),
        "get_rng_state": lambda device=None: _GENERATOR.get_state(),
        "set_rng_state": lambda state, device=None: _GENERATOR.set_state(state),
        "get_rng_state_all": lambda: [_GENERATOR.get_state()],
        "set_rng_state_all": lambda states: _GENERATOR.set_state(states[0]),
        "manual_seed": lambda seed: _GENERATOR.manual_seed(int(seed)),
        "initial_seed": _GENERATOR.initial_seed,
    }
    classes: dict[str, Any] = {
        "Stream": Stream,
        "ExternalStream": Stream,
        "Event": Event,
        "stream": _Guard,
        "StreamContext": _Guard,
        "device": _Guard,
        "device_of": _Guard,
        "default_generators": (_GENERATOR,),
    }
    # One function object per name: torch._dynamo.trace_rules keys its rules by object.
    return (
        {name: _constant(value) for name, value in constants.items()}
        | {name: _distinct(_nothing) for name in nothing}
        | {name: _distinct(function) for name, function in functions.items()}
        | classes
    )


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _distinct(function: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs)


@changes(
    "torch.cuda",
    "torch.accelerator",
    "torch.Tensor.record_stream",
    why="under `--device cpu`, `torch.cuda` is one device, the CPU: streams, events, memory and random state",
    stays="it is what `--device cpu` is",
)
def install() -> None:
    """Put the surface in place of ``torch.cuda``'s functions and classes."""
    names = surface()
    for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
        for name, value in names.items():
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, value)
    for name in ("range_push", "range_pop", "range_start", "range_end", "mark"):
        setattr(torch.cuda.nvtx, name, _distinct(_nothing))
    torch.Tensor.record_stream = _distinct(_nothing)  # type: ignore[method-assign]
    # Torch's own internals (DataLoader, Optimizer, dynamo) ask the device-neutral interface,
    # which keeps telling the truth.
    torch.accelerator.current_accelerator = _constant(None)
    torch.accelerator.is_available = _constant(False)
    torch.accelerator.device_count = _constant(0)
