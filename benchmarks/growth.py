"""How CPU time and memory grow with the number, or the size, of what a user has: each axis a row.

Three sizes, each ten times the one before, in processes of their own: this checkout's, and another's with
``--before``, and other code's; of each this one takes a share, at the largest size. The exponent is that of
what grows: 1 where ten times as much costs ten times as much. What a checkout can't do is told, with the
first size that it fails at.

    python benchmarks/growth.py --before OTHER_CHECKOUT --output growth.json
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from growth_axes import AXES, PREPROCESS, WORDS, Axis, documents
from machine import command, machine
from preprocess_peers.measure import Measurement, MeasurementError, measure

HERE = Path(__file__).parents[1]
_NOISE = 0.05


def make_tokenizer(folder: Path) -> None:
    """Train a small byte-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS, __doc__ or "", Path(__file__).read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def exponent(sizes: list[int], costs: list[float | None]) -> float | None:
    """Return that of what is more than at the smallest size; None where that is noise, or not measured."""
    if len(sizes) < 3 or any(cost is None for cost in costs):
        return None
    least, middle, most = (cost for cost in costs if cost is not None)
    first, second = middle - least, most - least
    if first < _NOISE * least or second < _NOISE * least:
        return None
    return math.log(second / first) / math.log((sizes[2] - sizes[0]) / (sizes[1] - sizes[0]))


class Runner:
    """Measures what axes run, in a folder."""

    def __init__(self, checkouts: dict[str, Path], work: Path, timeout: float) -> None:
        self.checkouts, self.timeout = checkouts, timeout
        self.work, self.folder, self.out = work, work / "input", work / "out"

    def rows(self, axis: Axis, shrink: int = 1) -> list[dict[str, Any]]:
        """Measure each checkout at each size, in turns."""
        sizes = [max(1, axis.smallest // shrink) * 10**power for power in range(3)]
        contestants = {name: (checkout, axis.arguments) for name, checkout in self.checkouts.items()}
        if axis.stock:
            contestants[axis.stock_name] = (HERE, axis.stock)
        rows = [
            {"axis": axis.name, "code": name, "sizes": sizes, "cpu_s": [], "peak_mb": [], "failed": None}
            for name in contestants
        ]
        for size in sizes:
            made = False
            for row, (checkout, arguments) in zip(rows, contestants.values(), strict=True):
                if row["failed"] is None:
                    self._empty(self.out, *([] if made else [self.folder]))
                    if not made:
                        axis.make(self.folder, size)
                    made = not axis.changed
                    try:
                        if axis.prepare:
                            self._run(axis.prepare, checkout, row["code"], size)
                        taken = self._run(arguments, checkout, row["code"], size)
                    except MeasurementError as error:
                        print(error, file=sys.stderr)
                        row["failed"] = f"{size:,}: {self._why(error)}"
                    else:
                        row["cpu_s"].append(taken.cpu_seconds)
                        row["peak_mb"].append((taken.peak_bytes or 0) / 1e6)
                        continue
                row["cpu_s"].append(None)
                row["peak_mb"].append(None)
        for row in rows:
            row["cpu_exponent"] = exponent(sizes, row["cpu_s"])
            row["memory_exponent"] = exponent(sizes, row["peak_mb"])
        _add_ratios(rows)
        return rows

    def _run(self, given: tuple[str, ...], checkout: Path, name: str, size: int) -> Measurement:
        places = {
            "{folder}": self.folder,
            "{out}": self.out,
            "{tokenizer}": self.work / "tokenizer",
            "{size}": size,
            "{checkout}": checkout,
        }
        arguments = list(given)
        for place, value in places.items():
            arguments = [argument.replace(place, str(value)) for argument in arguments]
        if arguments[0] != "-c":
            arguments[0] = str(checkout / arguments[0])
        environment = {
            # Its own helpers of benchmarks, and this one's that it has not.
            "PYTHONPATH": f"{checkout}:{checkout / 'benchmarks'}:{HERE / 'benchmarks'}",
            "XDG_CACHE_HOME": str(self.work / f"cache-{name}"),
            "OMP_NUM_THREADS": "1",
        }
        # Not from the current folder, as -c would: that is a checkout too.
        command = [sys.executable, "-P", *arguments]
        return measure(command, environment, self.work / "log", memory=1, timeout=self.timeout)

    @staticmethod
    def _empty(*folders: Path) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def _why(self, error: MeasurementError) -> str:
        if f"ended with {-signal.SIGKILL}:" in str(error):
            return f"more than {self.timeout:.0f} s"
        return str(error).strip().splitlines()[-1]


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add what this checkout takes of each other's, at the largest size that both were measured at."""
    mine = next(row for row in rows if row["code"] == "now")
    for cost in ("cpu_s", "peak_mb"):
        mine[f"{cost}_of"] = {}
        for other in rows:
            both = [pair for pair in zip(mine[cost], other[cost], strict=True) if None not in pair]
            if other is not mine and both and both[-1][1]:
                mine[f"{cost}_of"][other["code"]] = both[-1][0] / both[-1][1]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    columns = ("axis", "sizes", "code", "CPU s", "exponent", "share", "peak MB", "exponent", "share")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|--:|---|---|--:|---|"]

    def numbers(values: list[float | None], digits: int) -> str:
        return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in values)

    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    def shares(row: dict[str, Any], cost: str) -> str:
        return ", ".join(f"{value:.2f} of {name}" for name, value in row.get(f"{cost}_of", {}).items())

    for row in rows:
        cells = [
            row["axis"],
            " / ".join(f"{size:,}" for size in row["sizes"]),
            row["code"] + (f"; {row['failed']}" if row["failed"] else ""),
            numbers(row["cpu_s"], 2),
            ("" if row["failed"] else "flat") if row["cpu_exponent"] is None else ratio(row["cpu_exponent"]),
            shares(row, "cpu_s"),
            numbers(row["peak_mb"], 0),
            ("" if row["failed"] else "flat")
            if row["memory_exponent"] is None
            else ratio(row["memory_exponent"]),
            shares(row, "peak_mb"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [axis.name for axis in AXES]
    parser.add_argument("--before", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--axes", nargs="+", choices=names, default=names)
    parser.add_argument("--shrink", type=int, default=1, help="divide the smallest sizes, for a rehearsal")
    parser.add_argument("--timeout", type=float, default=600, help="seconds until a run counts as hung")
    parser.add_argument("--output", type=Path, help="a JSON file, written anew after each axis")
    options = parser.parse_args()
    checkouts = {"before": options.before.resolve()} if options.before else {}
    checkouts["now"] = HERE
    report: dict[str, Any] = {"device": machine(), "command": command(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        runner = Runner(checkouts, work, options.timeout)
        chosen = [axis for axis in AXES if axis.name in options.axes]
        if any("{tokenizer}" in axis.arguments for axis in chosen):
            make_tokenizer(work / "tokenizer")
            runner.rows(Axis("", 1, documents, PREPROCESS))  # it is looked at once, and then cached
        for axis in chosen:
            rows = runner.rows(axis, options.shrink)
            print(table(rows), flush=True)
            report["rows"] += rows
            if options.output:
                options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report["rows"]))


if __name__ == "__main__":
    main()
