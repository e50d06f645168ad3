"""How CPU time and memory grow with the number, or the size, of what a user has: each axis a row.

Three sizes, each ten times the one before, in processes of their own: this checkout's, and another's with
``--before``. The exponent is that of what grows: 1 where ten times as much costs ten times as much.

    python benchmarks/growth.py --before OTHER_CHECKOUT --output growth.json
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from growth_axes import AXES, PREPROCESS, WORDS, Axis, documents
from machine import command, machine
from preprocess_peers.measure import MeasurementError, measure

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


def exponent(sizes: list[int], costs: list[float]) -> float | None:
    """Return that of what is more than at the smallest size; None where that is noise."""
    first, second = costs[1] - costs[0], costs[2] - costs[0]
    if first < _NOISE * costs[0] or second < _NOISE * costs[0]:
        return None
    return math.log(second / first) / math.log((sizes[2] - sizes[0]) / (sizes[1] - sizes[0]))


def run(axis: Axis, checkouts: dict[str, Path], work: Path, timeout: float) -> list[dict[str, Any]]:
    """Measure each checkout at each size, in turns."""
    sizes = [axis.smallest * 10**power for power in range(3)]
    contestants = {name: (checkout, axis.arguments) for name, checkout in checkouts.items()}
    if axis.stock:
        contestants["Megatron's"] = (HERE, axis.stock)
    rows = [{"axis": axis.name, "code": name, "cpu_s": [], "peak_mb": []} for name in contestants]
    for size in sizes:
        for row, (checkout, given) in zip(rows, contestants.values(), strict=True):
            folder, out = work / "input", work / "out"
            for path in (folder, out):
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
            axis.make(folder, size)
            places = {"{folder}": folder, "{out}": out, "{tokenizer}": work / "tokenizer", "{size}": size}
            arguments = list(given)
            for name, value in places.items():
                arguments = [argument.replace(name, str(value)) for argument in arguments]
            if arguments[0] != "-c":
                arguments[0] = str(checkout / arguments[0])
            environment = {
                "PYTHONPATH": f"{checkout}:{HERE / 'benchmarks'}",
                "XDG_CACHE_HOME": str(work / f"cache-{row['code']}"),
                "OMP_NUM_THREADS": "1",
            }
            try:
                taken = measure(
                    [sys.executable, *arguments], environment, work / "log", memory=1, timeout=timeout
                )
                row["cpu_s"].append(taken.cpu_seconds)
                row["peak_mb"].append((taken.peak_bytes or 0) / 1e6)
            except MeasurementError as error:
                print(error, file=sys.stderr)
                row["cpu_s"].append(math.nan)
                row["peak_mb"].append(math.nan)
    for row in rows:
        row["sizes"] = sizes
        row["cpu_exponent"] = exponent(sizes, row["cpu_s"])
        row["memory_exponent"] = exponent(sizes, row["peak_mb"])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| axis | sizes | code | CPU s | exponent | peak MB | exponent |",
        "|---|---|---|---|--:|---|--:|",
    ]
    for row in rows:
        cells = [
            row["axis"],
            " / ".join(f"{size:,}" for size in row["sizes"]),
            row["code"],
            " / ".join(f"{value:.2f}" for value in row["cpu_s"]),
            "flat" if row["cpu_exponent"] is None else f"{row['cpu_exponent']:.2f}",
            " / ".join(f"{value:.0f}" for value in row["peak_mb"]),
            "flat" if row["memory_exponent"] is None else f"{row['memory_exponent']:.2f}",
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
    parser.add_argument("--timeout", type=float, default=600, help="seconds until a run counts as hung")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    checkouts = {"before": options.before.resolve()} if options.before else {}
    checkouts["now"] = HERE
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_tokenizer(work / "tokenizer")
        chosen = [axis for axis in AXES if axis.name in options.axes]
        if any(axis.arguments[0] != "-c" for axis in chosen):
            warm = Axis("", 1, documents, PREPROCESS)  # the tokenizer is looked at once, and then cached
            run(warm, checkouts, work, options.timeout)
        for axis in chosen:
            rows += run(axis, checkouts, work, options.timeout)
            print(table([row for row in rows if row["axis"] == axis.name]), flush=True)
    print(table(rows))
    if options.output:
        report = {"device": machine(), "command": command(), "rows": rows}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
