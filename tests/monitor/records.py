"""Monitor's files for tests: written, and their lines."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_periln.monitor.record import RunRecord

HEADER = {
    "version": "0.1.0",
    "name": "run",
    "placement": "peri",
    "num_layers": 2,
    "hidden_size": 8,
    "parameters": 1234,
    "flags": {"lr": 1e-3, "bf16": True},
    "started": "2026-01-02T03:04:05+00:00",
}


def write(record: RunRecord, first: int, last: int, interval: int = 10) -> None:
    for step in range(first, last + 1):
        record.step(step, loss=1 / step, grad_norm=0.5, learning_rate=1e-3, tokens=64, seconds=0.25)
        if step % interval == 0:
            record.layers(step, [0, 1, 2, 3], {"stream_variance": [1.0 * step, 2.0, 3.0, 4.0]})


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def iterations(path: Path, kind: str = "step") -> list[int]:
    return [entry["iteration"] for entry in entries(path) if entry["kind"] == kind]
