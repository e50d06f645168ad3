"""Where the time goes from starting a pretraining process to the end of its first step, on the CPU.

Whole processes of ``megatron_periln.pretrain``, one after the other, each a job of one rank, in three
states: nothing compiled (no .pyc file, no index cache), compiled Python, and an index cache too. What
files they read is in memory. Prints a table of CPU seconds and writes JSON.

    python benchmarks/startup.py --output startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataset_startup import write_dataset
from machine import command, machine

STATES = ("nothing", ".pyc", ".pyc and indices")
"""What is there from an earlier run."""

PHASES = {
    "torch": "import of torch and megatron.core, the CPU in place of the GPU",
    "Megatron": "import of megatron.training and of this package",
    "flags": "flags parsed and checked, datasets checked",
    "initialize": "process groups and seeds",
    "model": "model and optimizer built",
    "data": "index caches built or loaded, data loaders",
    "first step": "forward, backward, Adam",
    "rest": "Python itself, and what lies between",
}

FLAGS = """--device cpu --transformer-impl local --num-layers 4 --hidden-size 256 --num-attention-heads 4
    --seq-length 256 --max-position-embeddings 256 --micro-batch-size 2 --global-batch-size 2 --lr 1e-4
    --train-iters 1 --eval-interval 1000 --eval-iters 0 --split 100,0,0 --num-workers 0
    --tokenizer-type NullTokenizer --vocab-size 4096"""


def child(flags: list[str]) -> None:
    """Pretrain, as ``megatron_periln.pretrain`` does, and print the seconds of each phase."""
    seconds: dict[str, list[float]] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        seconds[name] = [time.process_time() - cpu, time.perf_counter() - wall]

    def timed(module: Any, function: str, name: str) -> None:
        original = getattr(module, function)

        def call(*args: Any, **kwargs: Any) -> Any:
            with phase(name):
                return original(*args, **kwargs)

        setattr(module, function, call)

    from megatron_periln import pretrain

    sys.argv[1:] = flags
    with phase("torch"):
        pretrain.choose_device(flags)
    with phase("Megatron"):
        from megatron.training import training

        from megatron_periln.training import run
    timed(run, "parse", "flags")
    timed(training, "initialize_megatron", "initialize")
    timed(training, "setup_model_and_optimizer", "model")
    timed(training, "build_train_valid_test_data_iterators", "data")
    timed(training, "train_step", "first step")
    step = training.train_step

    def only_step(*args: Any, **kwargs: Any) -> Any:
        step(*args, **kwargs)
        cpu = time.process_time()
        seconds["all"] = [cpu, time.time() - float(os.environ["STARTED"])]
        print(f"\nphases {json.dumps(seconds)}", flush=True)
        os._exit(0)

    training.train_step = only_step
    run.run(time.time())


def measure(state: str, folder: Path, data: Path) -> dict[str, list[float]]:
    """Run one process; return the CPU and wall seconds of each phase."""
    compiled, cache = folder / "pyc", folder / "cache"
    if state == STATES[0]:
        shutil.rmtree(compiled, ignore_errors=True)
    if state != STATES[2]:
        shutil.rmtree(cache, ignore_errors=True)
    paths = ["--data-path", str(data), "--data-cache-path", str(cache)]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(compiled), "STARTED": str(time.time())}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, __file__, "--child", *FLAGS.split(), *paths],
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("phases ")]
    if not lines:
        sys.exit(f"a run ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    seconds = json.loads(lines[0].removeprefix("phases "))
    for kind in range(2):
        known = sum(seconds[name][kind] for name in PHASES if name != "rest")
        seconds.setdefault("rest", [0.0, 0.0])[kind] = seconds["all"][kind] - known
    return seconds


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the medians."""
    lines = ["| phase | " + " | ".join(STATES) + " | |", "|---|" + "--:|" * len(STATES) + "---|"]
    medians = [
        {name: statistics.median(run[name][0] for run in row["runs"]) for name in [*PHASES, "all"]}
        for row in rows
    ]
    for name, meaning in [*PHASES.items(), ("all", "CPU seconds")]:
        cells = " | ".join(f"{median[name]:.2f}" for median in medians)
        lines.append(f"| {name} | {cells} | {meaning} |")
    wall = " | ".join(f"{statistics.median(run['all'][1] for run in row['runs']):.2f}" for row in rows)
    return "\n".join([*lines, f"| all | {wall} | wall seconds |"])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1_000_000, help="of the dataset")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29591"}
    runs: dict[str, list[dict[str, list[float]]]] = {state: [] for state in STATES}
    device = machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "data", options.documents, seed=0)
        measure(STATES[0], folder, folder / "data")  # brings the files into memory
        for _ in range(options.rounds):
            for state in STATES:
                runs[state].append(measure(state, folder, folder / "data"))
    rows = [{"there": state, "runs": runs[state]} for state in STATES]
    print(table(rows))
    if options.output:
        settings = {"documents": options.documents, "rounds": options.rounds, "flags": FLAGS.split()}
        report = {"device": device, "command": command(), "settings": settings, "rows": rows}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
