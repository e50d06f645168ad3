"""Pretrain small GPTs with Pre-, Post- and Peri-LN from raw text, and compare them in a report.

The text is what every machine with Python has: the sources of its standard library. Data, seed and
flags are the same for all placements. The last run stops before its end and resumes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from corpus import Data, prepare
from jobs import Progress, run, say, train

ROOT = Path(__file__).resolve().parents[2]
FLAGS = Path("examples/quickstart/model.flags")
PLACEMENTS = ("pre", "post", "peri", "output")
STOP_AT = 140


def device_flags() -> tuple[int, list[str]]:
    """Return the number of ranks, and the flags, for the machine at hand."""
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        return 2, ["--device", "cpu"]
    flags = ["--bf16"]
    if importlib.util.find_spec("transformer_engine") is None:
        flags += ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"]
        flags += ["--no-masked-softmax-fusion"]
    return min(gpus, 2), flags


def train_placement(placement: str, folder: Path, data: Data, *, interrupted: bool) -> float:
    """Train with a norm placement in ``folder``; return the validation loss at the end."""
    folder.mkdir(parents=True)
    ranks, flags = device_flags()
    checkpoints, log, progress = folder / "checkpoints", folder / "train.log", Progress()
    arguments = [f"@{FLAGS}", *flags, "--norm-placement", placement, *data.flags]
    arguments += ["--tensor-model-parallel-size", str(ranks), "--save", str(checkpoints)]
    arguments += ["--tensorboard-dir", str(folder / "tensorboard")]
    arguments += ["--monitor-file", str(folder / "monitor.jsonl")]
    device = "the CPU" if "--device" in flags else "the GPU"
    say(f"Pretraining on {device}: norm placement {placement}, tensor parallel {ranks}")
    if interrupted:
        train([*arguments, "--exit-interval", str(STOP_AT)], ranks, log, progress)
        say(f"Stopped at iteration {STOP_AT}; resuming from the checkpoint")
        arguments += ["--load", str(checkpoints)]
    train(arguments, ranks, log, progress)
    return progress.validation


def summary(runs: Mapping[Path, float]) -> str:
    """Return a table of the runs in the folders that ``runs`` has, with their validation losses."""
    from megatron_periln.report.runs import load_runs
    from megatron_periln.report.tables import summary_table

    table = summary_table(load_runs(list(runs)))
    shown = ("Final loss", "Loss spikes", "Gradient spikes", "Variance, last layer", "Tokens/s")
    columns = [table.head.index(name) for name in shown]
    lines = [f"   {'placement':<12}{'validation':>12}" + "".join(f"{name:>22}" for name in shown)]
    for row, validation in zip(table.rows, runs.values(), strict=True):
        lines.append(f"   {row[0]:<12}{validation:>12.3f}" + "".join(f"{row[i]:>22}" for i in columns))
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
    data = prepare(options.folder / "data")
    folder = options.folder / time.strftime("%Y%m%d-%H%M%S")
    placements = list(dict.fromkeys(options.norm_placement))
    runs = {
        folder / name: train_placement(name, folder / name, data, interrupted=name == placements[-1])
        for name in placements
    }
    report = folder / "report.html"
    say("Comparing the runs")
    paths = [str(path) for path in runs]
    command = [sys.executable, "tools/report.py", *paths, "--output", str(report)]
    run([*command, "--title", "Quickstart"], folder / "report.log")

    say(
        f"Done in {time.time() - started:.0f} s; the unigram entropy of the tokens is "
        f"{data.unigram_entropy():.3f}"
    )
    print(
        f"""{summary(runs)}

   report           {report}: open it in a browser
   TensorBoard      tensorboard --logdir {folder}
   checkpoints      {folder}/*/checkpoints, logs {folder}/*/train.log

   Try next: python tools/export_hf.py --load {folder / placements[-1]}/checkpoints --output my-model
             make quickstart PLACEMENTS="peri output"
             @{FLAGS} holds the flags; add yours after it"""
    )


if __name__ == "__main__":
    main()
