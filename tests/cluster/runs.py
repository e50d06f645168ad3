"""Training runs on the cluster, and the same run on one machine that nothing disturbs."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import until
from tests.parallel.cases import ARCHITECTURES
from tests.parallel.jobs import COMMON, load_tensors

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "examples" / "slurm"
LAST = 24
MODEL = f"{COMMON} {ARCHITECTURES['dense']} --norm-placement peri --use-distributed-optimizer"
MODEL += f" --dist-ckpt-optim-fully-reshardable --eval-iters 0 --train-iters {LAST} --num-workers 2"
_INSIDE = str(Path(__file__).with_name("inside"))
_STEP = re.compile(r"step (\d+): (\S+) (\S+)\n")


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    folder: Path

    @property
    def log(self):
        """What all ranks of all starts wrote."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("jobs/*/*/node*.log")))

    @property
    def steps(self):
        """For each step, again after a restart, its (iteration, loss, gradient norm), in hexadecimal."""
        return [(int(match[1]), match[2], match[3]) for match in _STEP.finditer(self.log)]

    @property
    def saved(self):
        """The iteration of the last checkpoint."""
        tracker = self.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0

    @property
    def starts(self):
        """The iterations that the starts of its jobs began from."""
        histories = sorted(self.folder.glob("jobs/*/history"))
        return [int(line.split()[1]) for path in histories for line in path.read_text().splitlines()]

    @property
    def weights(self):
        """Every tensor of its last checkpoint."""
        return load_tensors(self.folder / "checkpoints" / f"iter_{self.saved:07d}")

    def wait_for(self, iteration, start=0, seconds=240):
        """Wait until a start has logged a step."""

        def logged():
            log = "".join(path.read_text() for path in self.folder.glob(f"jobs/*/restart_{start}/node*.log"))
            return any(int(match[1]) >= iteration for match in _STEP.finditer(log))

        until(logged, f"iteration {iteration} of {self.folder}", seconds)


class Trainer:
    """Starts runs, on the cluster or beside it."""

    def __init__(self, cluster, folder, data):
        self.cluster, self.folder = cluster, folder
        self.data = f"--data-path {data} --data-cache-path {folder / 'cache'}"

    def named(self, name):
        return Run(self.folder / name)

    def submit(self, name, flags="", *options, script="pretrain.sbatch", slow=0.0, **environment):
        """Submit a script as a user would; return the number of the job and its run."""
        given = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/root"),
            "PYTHON": sys.executable,
            "DOCTOR": "0",
            "PYTHONPATH": _INSIDE,
            "SLOW_STEP": str(slow),
        }
        given |= environment
        run = Run(self.folder / name)
        number = self.cluster.submit(
            *options,
            f"--output={self.folder}/{name}.log",
            SLURM / script,
            run.folder,
            *shlex.split(f"{MODEL} {self.data} {flags}"),
            env=given,
            cwd=ROOT,
        )
        return number, run

    def undisturbed(self, name, flags, ranks):
        """Train on this machine, without SLURM or any of its scripts."""
        run = Run(self.folder / name)
        logs = run.folder / "jobs" / "none" / "once"
        logs.mkdir(parents=True)
        arguments = f"{MODEL} {self.data} {flags} --save-interval 1000 --save {run.folder}/checkpoints"
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
        with (logs / "node.log").open("w") as log:
            subprocess.run(
                [*torchrun, "-m", "megatron_periln.pretrain", *shlex.split(arguments)],
                env={**os.environ, "PYTHONPATH": f"{_INSIDE}:{ROOT}", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                check=True,
                timeout=300,
            )
        return run
