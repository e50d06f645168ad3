"""What a preemption costs a run: saving, waiting in the queue, and coming back.

Starts SLURM with two nodes in namespaces of this machine (see docs/cluster.md: needs root and SLURM),
submits examples/slurm/pretrain.sbatch, and warns it several times as SLURM does before a time limit.
All times come from the logs of the run. Prints a table and writes JSON.

    python benchmarks/preemption.py --output results.json
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from machine import command, machine  # noqa: E402

from tests.cluster.hosts import until  # noqa: E402
from tests.cluster.slurm import Cluster, missing  # noqa: E402

MODEL = """--device cpu --seq-length 256 --max-position-embeddings 256 --normalization RMSNorm --swiglu
    --disable-bias-linear --position-embedding-type rope --norm-placement peri --mock-data
    --micro-batch-size 1 --global-batch-size 2 --train-iters 100000 --lr 1e-4
    --tokenizer-type NullTokenizer --vocab-size 4096
    --eval-iters 0 --eval-interval 100000 --log-interval 1 --save-interval 100000 --num-workers 0
    --use-distributed-optimizer"""
_STEP = re.compile(r"\[([\d-]+ [\d:.]+)\] iteration +(\d+)/")
_DECISION = re.compile(r"^([\d-]+ [\d:]+) job \d+, restart \d+: (time limit: |time limit; )", re.MULTILINE)


def moment(text: str) -> float:
    """Return the seconds since the epoch of a local date and time."""
    return datetime.fromisoformat(text).timestamp()


def steps(start: Path) -> list[tuple[float, int]]:
    """Return when a start's steps ended."""
    log = "".join(path.read_text() for path in start.glob("node*.log"))
    return [(moment(match[1]), int(match[2])) for match in _STEP.finditer(log)]


def preempt(cluster: Cluster, number: str, folder: Path, start: int, options: argparse.Namespace) -> None:
    """Warn the job once it has done a few steps of a start, and wait for steps of the next one."""
    job = folder / "jobs" / number

    def reached(restart: int, count: int) -> bool:
        if cluster.job(number).over:
            sys.exit(f"error: the job ended: {(folder.parent / 'batch.log').read_text()}")
        return len(steps(job / f"restart_{restart}")) >= count

    until(lambda: reached(start, options.steps), "steps", 600)
    cluster.login("scancel", "--batch", "--signal=USR1", number)
    until(lambda: reached(start + 1, 1), "steps after the restart", 600)


def parts(folder: Path, log: Path, number: str, start: int) -> dict[str, float]:
    """Return the seconds of one preemption, by part, and the steps that were repeated."""
    job = folder / "jobs" / number
    before, after = steps(job / f"restart_{start}"), steps(job / f"restart_{start + 1}")
    ended = [moment(match[1]) for match in _DECISION.finditer(log.read_text())][2 * start + 1]
    began = float((job / "history").read_text().splitlines()[start + 1].split()[2])
    return {
        "save": ended - before[-1][0],
        "requeue": began - ended,
        "resume": after[0][0] - began,
        "total": after[0][0] - before[-1][0],
        "repeated": before[-1][1] + 1 - after[0][1],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preemptions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="before each preemption")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--doctor", action="store_true", help="check the nodes before each start")
    parser.add_argument("--output", type=Path, help="the JSON to write")
    options = parser.parse_args()
    if reason := missing():
        sys.exit(f"error: {reason}")
    results = {"command": command(), **machine()}
    work = Path(tempfile.mkdtemp(prefix="preemption"))
    work.chmod(0o755)
    size = f"--num-layers {options.num_layers} --hidden-size {options.hidden_size} --num-attention-heads 4"
    try:
        with Cluster(work / "slurm", 2) as cluster:
            number = cluster.submit(
                "--nodes=2",
                f"--output={work}/batch.log",
                ROOT / "examples/slurm/pretrain.sbatch",
                work / "run",
                *shlex.split(f"{MODEL} {size}"),
                env={"PYTHON": sys.executable, "DOCTOR": str(int(options.doctor))},
                cwd=ROOT,
            )
            for start in range(options.preemptions):
                preempt(cluster, number, work / "run", start, options)
            cluster.login("scancel", number)
            until(lambda: cluster.job(number).over, "the job to end", 60)
            time.sleep(1)
            samples = [
                parts(work / "run", work / "batch.log", number, start) for start in range(options.preemptions)
            ]
        checkpoint = max((work / "run/checkpoints").glob("iter_*"))
        results["checkpoint_bytes"] = sum(path.stat().st_size for path in checkpoint.iterdir())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{'part':<10}{'median':>10}{'least':>10}{'most':>10}")
    for part in ("save", "requeue", "resume", "total", "repeated"):
        values = [sample[part] for sample in samples]
        print(f"{part:<10}{statistics.median(values):>10.1f}{min(values):>10.1f}{max(values):>10.1f}")
    if options.output:
        results |= {"options": vars(options) | {"output": None}, "samples": samples}
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
