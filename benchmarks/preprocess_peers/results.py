"""What was measured, as a table, as goals met or missed, and as JSON."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from preprocess_peers.contestants import BEFORE, OURS, RAW
from preprocess_peers.measure import Measurement

__all__ = ["Goal", "Row", "as_json", "beside", "goals", "peer_versions", "table"]

_LEAD = {"hf-32k": 45, "hf-128k": 40, "tiktoken": 15, "sentencepiece": 9}
_PEAK_MB = 600


@dataclass
class Row:
    """The runs of one contestant with one tokenizer at one number of workers.

    Parameters
    ----------
    input_bytes
        What it read of the corpus.
    samples
        The timed runs.
    memory
        The run with its memory sampled.
    output_bytes
        Size of what it wrote.
    digests
        SHA-256 of the ``.bin`` and ``.idx`` it wrote.
    tokens
        How many it wrote, where that is known.
    """

    tokenizer: str
    workers: int
    contestant: str
    input_bytes: int
    samples: list[Measurement] = field(default_factory=list)
    memory: Measurement | None = None
    output_bytes: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    tokens: int | None = None

    @property
    def best(self) -> Measurement:
        """The fastest timed run."""
        return min(self.samples, key=lambda sample: sample.seconds)

    @property
    def speed(self) -> float:
        """MB of the corpus a second."""
        return self.input_bytes / self.best.seconds / 1e6

    @property
    def peak_mb(self) -> float | None:
        """The largest memory, in MB."""
        peak = self.memory.peak_bytes if self.memory else None
        return None if peak is None else peak / 1e6


@dataclass(frozen=True)
class Goal:
    """A goal of the project and what was reached."""

    name: str
    wanted: float
    reached: float
    met: bool

    def __str__(self) -> str:
        return f"{'met   ' if self.met else 'MISSED'}  {self.name}: {self.reached:.2f}"


def _like(rows: list[Row], row: Row, contestant: str) -> Row | None:
    here = (row.tokenizer, row.workers, contestant)
    return next((r for r in rows if (r.tokenizer, r.workers, r.contestant) == here), None)


def table(rows: list[Row]) -> str:
    """Return the rows in Markdown, each with how much faster ours is and its share of the raw encoder."""
    names = ("tokenizer", "workers", "contestant", "wall s", "CPU s", "peak MB", "MB/s", "ours is", "of raw")
    lines = [f"| {' | '.join(names)} |", "|---|--:|---|" + "--:|" * 6]
    for row in rows:
        ours, raw = _like(rows, row, OURS), _like(rows, row, RAW)
        peak = "" if row.peak_mb is None else f"{row.peak_mb:.0f}"
        cells = [
            row.tokenizer,
            str(row.workers),
            row.contestant,
            f"{row.best.seconds:.2f}",
            f"{row.best.cpu_seconds:.2f}",
            peak,
            f"{row.speed:.1f}",
            f"{ours.speed / row.speed:.2f}x" if ours else "",
            f"{row.speed / raw.speed:.0%}" if raw else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def goals(rows: list[Row]) -> Iterator[Goal]:
    """Yield the goals at the largest number of workers that the rows can tell of."""
    workers = max(row.workers for row in rows)
    for row in rows:
        if row.contestant != OURS or row.workers != workers:
            continue
        for name, lead in (("megatron-0.19", _LEAD[row.tokenizer]), ("megatron-main", 3)):
            if peer := _like(rows, row, name):
                ratio = row.speed / peer.speed
                yield Goal(f"{row.tokenizer}: >= {lead}x {name}", lead, ratio, ratio >= lead)
        if raw := _like(rows, row, RAW):
            share = row.speed / raw.speed
            yield Goal(f"{row.tokenizer}: >= 0.75 of the raw encoder", 0.75, share, share >= 0.75)
        if row.peak_mb is not None:
            met = row.peak_mb <= _PEAK_MB
            yield Goal(f"{row.tokenizer}: peak memory <= {_PEAK_MB} MB", _PEAK_MB, row.peak_mb, met)


def beside(rows: list[Row]) -> str:
    """Return what ours takes of the other checkout's CPU time and wall time, the least of each, in Markdown.

    CPU time is what tells on a machine that others use too.
    """
    lines = ["| tokenizer | workers | CPU s before | CPU s | ratio | wall s before | wall s | ratio |"]
    lines.append("|---|--:|" + "--:|" * 6)
    for row in rows:
        ours = _like(rows, row, OURS)
        if row.contestant != BEFORE or ours is None:
            continue
        cells = [row.tokenizer, str(row.workers)]
        for name in ("cpu_seconds", "seconds"):
            was, now = (min(getattr(sample, name) for sample in each.samples) for each in (row, ours))
            cells += [f"{was:.2f}", f"{now:.2f}", f"{now / was:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Return the rows with all samples, and the ratios of the table."""
    result = []
    for row in rows:
        ours, raw = _like(rows, row, OURS), _like(rows, row, RAW)
        derived = {
            "seconds": row.best.seconds,
            "cpu_seconds": row.best.cpu_seconds,
            "peak_mb": row.peak_mb,
            "mb_per_second": row.speed,
            "ours_is_faster_by": ours.speed / row.speed if ours else None,
            "share_of_raw_encoder": row.speed / raw.speed if raw else None,
        }
        result.append(derived | asdict(row))
    return result


def peer_versions(options: argparse.Namespace) -> dict[str, str]:
    """Return the versions of the other tools that ``options`` name."""
    versions = {}
    for checkout in (options.megatron_0_19, options.megatron_main):
        if checkout:
            text = (checkout / "megatron/core/package_info.py").read_text()
            parts = re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", text, re.MULTILINE)
            versions[f"checkout {checkout.name}"] = ".".join(parts)
    pythons = {
        "datatrove": options.datatrove_python,
        "dolma": options.dolma and options.dolma.with_name("python"),
    }
    for package, python in pythons.items():
        if python:
            code = f"import importlib.metadata as m; print(m.version({package!r}), m.version('tokenizers'))"
            printed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
            versions[package], versions[f"{package}'s tokenizers"] = printed.split()
    return versions
