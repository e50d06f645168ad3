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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import command, machine
from preprocess_peers.measure import MeasurementError, measure

HERE = Path(__file__).parents[1]
WORDS = "a few words of a text that goes on, and some more of them in a sentence.\n"
_NOISE = 0.05


@dataclass(frozen=True)
class Axis:
    """What grows.

    Parameters
    ----------
    name
        What there is more of.
    smallest
        The first of the sizes.
    make
        Makes the input of a size in a folder.
    arguments
        Of Python, which is run in a checkout; ``{folder}`` and ``{size}`` are replaced.
    """

    name: str
    smallest: int
    make: Callable[[Path, int], None]
    arguments: tuple[str, ...]


def small_files(folder: Path, size: int) -> None:
    """Write JSON Lines of one document each."""
    for number in range(size):
        (folder / f"part_{number:07d}.jsonl").write_text(json.dumps({"text": WORDS}) + "\n")


def documents(folder: Path, size: int) -> None:
    """Write one file of documents."""
    with (folder / "in.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": f"{number} {WORDS}"}) + "\n" for number in range(size))


def long_document(folder: Path, size: int) -> None:
    """Write one document of so many kB."""
    text = (WORDS * (size * 1000 // len(WORDS) + 1))[: size * 1000]
    (folder / "in.jsonl").write_text(json.dumps({"text": text}) + "\n")


def row_group(folder: Path, size: int) -> None:
    """Write a Parquet file of one row group of so many MB."""
    import numpy as np
    import pyarrow
    from pyarrow import parquet

    words = [f"w{number:05d}" for number in range(1 << 16)]
    draws = np.random.default_rng(0).integers(0, len(words), (size * 100, 1400))
    texts = [" ".join(words[at] for at in row) for row in draws]
    parquet.write_table(pyarrow.table({"text": texts}), folder / "in.parquet", row_group_size=len(texts))


def checkpoint(folder: Path, size: int) -> None:
    """Write files of a checkpoint, with their sums as the writer leaves them."""
    for number in range(size):
        path = folder / f"__{number}_0.distcp"
        path.write_bytes(b"0" * 64)
        path.with_name(f"{path.name}.crc32").write_text("64 00000000")


_PREPROCESS = (
    "tools/preprocess_data.py",
    *("--input", "{folder}", "--output-prefix", "{out}/data", "--workers", "1", "--overwrite"),
    *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{tokenizer}", "--append-eod"),
)
_MANIFEST = """import sys; from pathlib import Path
from megatron_periln.checkpoints.manifest import Manifest
folder = Path(sys.argv[1]); Manifest.of(folder, sums=True).write(folder)"""

AXES = (
    Axis("small input files", 100, small_files, _PREPROCESS),
    Axis("documents", 10_000, documents, _PREPROCESS),
    Axis("kB of one document, tokenizers", 100, long_document, (*_PREPROCESS, "--encoder", "tokenizers")),
    Axis("kB of one document, gigatoken", 1000, long_document, (*_PREPROCESS, "--encoder", "gigatoken")),
    Axis("MB of a Parquet row group", 2, row_group, _PREPROCESS),
    Axis("files of a checkpoint, manifest", 100, checkpoint, ("-c", _MANIFEST, "{folder}")),
)
"""All axes; a new one is a line here."""


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
    rows = [{"axis": axis.name, "code": name, "cpu_s": [], "peak_mb": []} for name in checkouts]
    for size in sizes:
        for row, checkout in zip(rows, checkouts.values(), strict=True):
            folder, out = work / "input", work / "out"
            for path in (folder, out):
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
            axis.make(folder, size)
            places = {"{folder}": folder, "{out}": out, "{tokenizer}": work / "tokenizer", "{size}": size}
            arguments = list(axis.arguments)
            for name, value in places.items():
                arguments = [argument.replace(name, str(value)) for argument in arguments]
            if arguments[0] != "-c":
                arguments[0] = str(checkout / arguments[0])
            environment = {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(work / f"cache-{row['code']}")}
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
            warm = Axis("", 1, documents, _PREPROCESS)  # the tokenizer is looked at once, and then cached
            run(warm, checkouts, work, options.timeout)
        for axis in chosen:
            rows += run(axis, checkouts, work, options.timeout)
            print(table(rows[-len(checkouts) :]), flush=True)
    print(table(rows))
    if options.output:
        report = {"device": machine(), "command": command(), "rows": rows}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
