"""Pretrain small GPTs with Pre-, Post- and Peri-LN from raw text, compare them in a report, and export one.

The text is what every machine with Python has: the sources of its standard library. Data, seed and
flags are the same for all placements, which train at the same time. The last run stops before its end and
resumes in another layout; transformers then writes some lines with what was exported.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from corpus import Data, prepare
from jobs import Job, run, say, train

ROOT = Path(__file__).resolve().parents[2]
FLAGS = Path("examples/quickstart/model.flags")
PLACEMENTS = ("pre", "post", "peri", "output")
STOP_AT = 140
VOCABULARY = 2048


def device_flags() -> tuple[int, list[str]]:
    """Return the ranks of the resumed run, and the flags, for the machine at hand."""
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        return 2, ["--device", "cpu"]
    flags = ["--bf16"]
    if importlib.util.find_spec("transformer_engine") is None:
        flags += ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"]
        flags += ["--no-masked-softmax-fusion"]
    return min(gpus, 2), flags


def train_all(placements: Sequence[str], folder: Path, data: Data) -> dict[Path, float]:
    """Train with each placement in a folder of its own; return their validation losses at the end.

    All at the same time, a process each. The last one stops at ``STOP_AT`` and resumes on more ranks at once,
    beside the others.
    """
    ranks, device = device_flags()
    runs: list[list[Job]] = []
    for placement in placements:
        place = folder / placement
        place.mkdir(parents=True)
        arguments = [f"@{FLAGS}", *device, "--norm-placement", placement, *data.flags]
        arguments += ["--save", str(place / "checkpoints"), "--tensorboard-dir", str(place / "tensorboard")]
        arguments += ["--monitor-file", str(place / "monitor.jsonl")]
        runs.append([Job(placement, arguments, place / "train.log")])
    name, whole, log = placements[-1], runs[-1][0].arguments, runs[-1][0].log
    resumed = ["--load", str(folder / name / "checkpoints"), "--tensor-model-parallel-size", str(ranks)]
    runs[-1] = [
        Job(name, [*whole, "--exit-interval", str(STOP_AT)], log),
        Job(name, [*whole, *resumed], log, ranks),
    ]
    say(
        f"Pretraining on {'the CPU' if '--device' in device else 'a GPU'}: {', '.join(placements)}; {name} "
        f"stops at iteration {STOP_AT} and resumes from its checkpoint, tensor parallel {ranks}"
    )
    train(*runs)
    return {folder / jobs[0].name: jobs[-1].progress.validation for jobs in runs}


def summary(runs: Mapping[Path, float], entropy: float) -> str:
    """Return what was seen of the runs in the folders that ``runs`` has, with their validation losses.

    Parameters
    ----------
    entropy
        Of the tokens' frequencies, in nats.
    """
    from megatron_periln.report.runs import load_runs
    from megatron_periln.report.tables import summary_table

    loaded = load_runs(list(runs))
    table = summary_table(loaded)
    shown = ("Final loss", "Loss spikes", "Gradient spikes", "Variance, last layer", "Tokens/s")
    columns = [table.head.index(name) for name in shown]
    lines = [f"   {'placement':<12}{'validation':>12}" + "".join(f"{name:>22}" for name in shown)]
    for row, validation in zip(table.rows, runs.values(), strict=True):
        lines.append(f"   {row[0]:<12}{validation:>12.3f}" + "".join(f"{row[i]:>22}" for i in columns))
    best = min(runs, key=lambda folder: (math.isnan(runs[folder]), runs[folder]))
    tokens = loaded[list(runs).index(best)].run.steps.tokens.sum()
    lines.append(
        f"   {best.name} learned most: after {tokens / 1e6:.2f} million tokens its validation loss is "
        f"{entropy - runs[best]:.2f} below {entropy:.2f}, that of knowing only how often tokens occur"
    )
    return "\n".join(lines)


def main() -> None:
    """Take the tour."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--norm-placement", nargs="+", default=["pre", "post", "peri"], choices=PLACEMENTS)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/quickstart"),
        help="where everything goes, from the repository's root",
    )
    options = parser.parse_args()

    os.chdir(ROOT)
    started = time.time()
    data = prepare(options.folder / f"data-{VOCABULARY}", VOCABULARY)
    folder = options.folder / time.strftime("%Y%m%d-%H%M%S")
    placements = list(dict.fromkeys(options.norm_placement))
    runs = train_all(placements, folder, data)
    last = folder / placements[-1]
    report, model = folder / "report.html", folder / "model"
    say(f"Comparing the runs, and exporting {last.name} to transformers")
    compare = [sys.executable, "tools/report.py", *map(str, runs), "--output", str(report)]
    export = [sys.executable, "tools/export_hf.py", "--load", f"{last}/checkpoints", "--output", str(model)]
    run(([*compare, "--title", "Quickstart"], folder / "report.log"), (export, folder / "export.log"))
    written = folder / "sample.txt"
    run(([sys.executable, "examples/quickstart/sample.py", str(model), str(written)], folder / "sample.log"))

    say(f'Done in {time.time() - started:.0f} s; try next: make quickstart PLACEMENTS="peri output"')
    lines = "\n".join(f"   | {line}" for line in written.read_text().splitlines()[:3])
    print(
        f"""{summary(runs, data.unigram_entropy())}
   what {last.name} writes, by transformers:
{lines}
   report, for a browser: {report}; flags: {FLAGS}; for TensorBoard: {folder}; model: {model}"""
    )


if __name__ == "__main__":
    main()
