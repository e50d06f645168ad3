"""What starting a pretraining costs from the launcher to the end of its first step, beside another checkout.

Whole jobs of one rank on the CPU, each with its launcher, in turns: ``torchrun`` and this package's
``launch``, each of the other checkout and of this one. Counts the CPU time of the whole process tree, with
compiled Python and files in memory. Prints a table and writes JSON.

    git worktree add --detach /tmp/before e580f41
    python benchmarks/launch_startup.py --beside /tmp/before --output launch_startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import command, machine

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = {"torchrun": "torch.distributed.run", "launch": "megatron_periln.launch"}
FLAGS = """--device cpu --transformer-impl local --num-layers 2 --hidden-size 64 --num-attention-heads 4
    --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 2 --lr 1e-4
    --train-iters 1 --eval-interval 1000 --eval-iters 0 --num-workers 0 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 255 --log-interval 1 --seed 7"""


def measure(checkout: Path, launcher: str, compiled: Path) -> tuple[float, float, str]:
    """Run one job; return its CPU seconds, its wall seconds, and what it says of its step."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONPYCACHEPREFIX": str(compiled)}
    environment |= {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    job = [sys.executable, "-m", LAUNCHERS[launcher], "--standalone", "--nproc-per-node", "1"]
    job += ["-m", "megatron_periln.pretrain", *FLAGS.split()]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(job, cwd=checkout, env=environment, capture_output=True, text=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    steps = [line for line in done.stdout.splitlines() if "lm loss:" in line]
    if done.returncode or not steps:
        sys.exit(f"a job ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, wall, steps[0].partition("lm loss:")[2]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path, required=True, help="another checkout, as of e580f41")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    checkouts = {"before": options.beside.resolve(), "now": ROOT}
    samples: dict[str, list[list[float]]] = {}
    steps = set()
    device = machine()
    with tempfile.TemporaryDirectory() as compiled:
        for number in range(-1, options.rounds):  # the first round compiles
            for name, checkout in checkouts.items():
                for launcher in (
                    LAUNCHERS if (checkout / "megatron_periln/launch.py").exists() else ["torchrun"]
                ):
                    cpu, wall, step = measure(checkout, launcher, Path(compiled))
                    steps.add(step)
                    if number >= 0:
                        samples.setdefault(f"{name}, {launcher}", []).append([cpu, wall])
    if len(steps) > 1:
        sys.exit(f"the jobs differ in their first step: {steps}")
    first = statistics.median(cpu for cpu, _ in samples["before, torchrun"])
    print("| job | CPU seconds | beside the first | wall seconds |\n|---|--:|--:|--:|")
    for job, runs in samples.items():
        cpu, wall = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"| {job} | {cpu:.2f} | {cpu / first:.2f} | {wall:.2f} |")
    if options.output:
        report: dict[str, Any] = {"device": device, "command": command(), "flags": FLAGS.split()}
        options.output.write_text(json.dumps({**report, "samples": samples}, indent=2) + "\n")


if __name__ == "__main__":
    main()
