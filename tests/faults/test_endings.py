"""However a rank ends, and whatever it is doing: the right status, no process left, its checkpoints whole.

`tests.parallel.jobs` checks of every job that no process is left.
"""

import os
import re
import shlex
import sys
import time

import psutil
import pytest

from megatron_periln.checkpoints.manifest import Manifest
from tests.faults.test_fencing import ONE_BY_ONE
from tests.parallel.connecting import ROOT
from tests.parallel.jobs import COMMON
from tests.parallel.test_checkpoints import ASYNC
from tests.training.model import MODEL

SAVING = {"sync": "", "async": ASYNC}
HEEDS = "--exit-signal-handler"
# How it ends; its flags; data workers; how it saves; the status; the last checkpoint that counts.
# One is saved after every other step, and what is to happen happens after the fifth.
TABLE = [
    ("exception", HEEDS, 1, "sync", 1, 4),
    ("exception", HEEDS, 3, "async", 1, 2),
    ("exception", "", 0, "async", 1, 2),
    ("exit 3", HEEDS, 1, "async", 3, 2),
    ("exit 3", "", 3, "sync", 3, 4),
    ("refusal", HEEDS, 3, "async", 1, 2),
    ("SIGTERM", HEEDS, 0, "sync", 0, 5),
    ("SIGTERM", HEEDS, 3, "async", 0, 5),
    ("SIGTERM", "", 1, "async", -15, 2),
    ("SIGTERM", "--exit-signal-handler-for-training", 1, "sync", 0, 5),
    ("SIGINT", HEEDS, 3, "async", 130, 2),
    ("SIGINT", "", 1, "sync", 130, 4),
    ("SIGHUP", HEEDS, 1, "async", -1, 2),
    ("SIGKILL", HEEDS, 3, "async", -9, 2),
    ("launcher gone", HEEDS, 3, "sync", 1, 4),
    ("launcher gone", "", 1, "async", 1, 2),
    ("worker killed", HEEDS, 3, "async", 1, 2),
    ("writer killed", HEEDS, 1, "async", 1, 2),
    ("time is up", f"{HEEDS} --exit-duration-in-mins 1000", 3, "async", 0, 5),
    ("interval", f"{HEEDS} --exit-interval 5", 1, "sync", 0, 5),
    ("done", HEEDS, 3, "async", 0, 6),
]


def saved(checkpoints):
    """The iteration that the folder's tracker names, whose files are all as they were written."""
    iteration = int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
    folder = checkpoints / f"iter_{iteration:07d}"
    manifest = Manifest.read(folder)
    manifest.check_sizes(folder)
    manifest.check_sums(folder)
    return iteration


def named(row):
    end, flags, workers, saving, *_ = row
    return f"{end}{'' if flags.startswith(HEEDS) else ' unheeded'}, {workers}, {saving}".replace(" ", "_")


@pytest.mark.parametrize("row", TABLE, ids=named)
def test_one_rank(jobs, row):
    end, flags, workers, saving, status, last = row
    changes = [ONE_BY_ONE, "tests.faults.accidents.ends"]
    if last == 2:  # the next one is still being saved
        changes.append("tests.faults.accidents.endless_write")
    if end == "launcher gone":
        changes.append("tests.faults.accidents.launched")
    job = jobs.run(
        named(row),
        f"{MODEL} --save-interval 2 {SAVING[saving]} --num-workers {workers} {flags}",
        changes=changes,
        environment={"END": end, "WHO": "" if end in ("interval", "done") else "0"},
        succeeds=False,
    )
    if end == "launcher gone":
        assert (job.exit_codes, job.orphans.count(status)) == ([-9], 1), (job.orphans, job.log)
    else:
        assert job.exit_codes == [status], job.log
    assert saved(job.folder / "checkpoints") == last


@pytest.mark.parametrize(
    ("end", "statuses", "last"), [("exception", [1, 1], 2), ("SIGKILL", [1, -9], 2), ("SIGTERM", [0, 0], 5)]
)
def test_the_second_of_two_ranks(jobs, end, statuses, last):
    """The first one is told by its signal, or meets an error itself, and waits for nothing that is gone."""
    job = jobs.run(
        f"{end}_of_two",
        f"{MODEL} --save-interval 2 {ASYNC} --num-workers 1 {HEEDS}",
        2,
        changes=[
            ONE_BY_ONE,
            "tests.faults.accidents.ends",
            *(["tests.faults.accidents.endless_write"] if last == 2 else []),
        ],
        environment={"END": end, "WHO": "1"},
        succeeds=False,
    )
    assert job.exit_codes == statuses, job.log
    assert saved(job.folder / "checkpoints") == last


def test_megatron_s_own_way_out(jobs, tmp_path):
    """It leaves by ``sys.exit()``, with status 0, where it can't go on; with 0 the next job would start."""
    flags = f"{MODEL} --load {tmp_path} --exit-on-missing-checkpoint"
    job = jobs.run("missing", flags, 2, succeeds=False)
    assert job.exit_codes == [1, 1], job.log
    (error,) = [line for line in job.log.splitlines() if line.startswith("error:")]
    assert re.fullmatch(r".*, as failed \(megatron/training/checkpointing.py:\d+\); the log says .*", error)
    assert "exiting" in job.log[: job.log.index(error)]


@pytest.fixture
def torchrun(tmp_path):
    """Start a rank by torchrun, with a data worker; end what is left of it."""
    started = []

    def start(flags, log):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        arguments = f"{COMMON} {MODEL} --mock-data --data-cache-path {tmp_path}/cache {HEEDS} {flags}"
        process = psutil.Popen(
            [*command, "-m", "megatron_periln.pretrain", *shlex.split(arguments), "--num-workers", "1"],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_running():
            for one in [*process.children(recursive=True), process]:
                one.kill()
            process.wait()


def test_an_error_ends_torchrun(torchrun, tmp_path):
    """Python is left to end by itself, as it isn't in the jobs above."""
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = torchrun("--lr 1e38 --clip-grad 0 --lr-warmup-iters 0 --lr-decay-style constant", stream)
        assert process.wait(timeout=180) == 1, log.read_text()
    assert "the optimizer's step is beyond fp32" in log.read_text()


def test_ranks_end_with_torchrun(torchrun, tmp_path):
    log = tmp_path / "log"
    save = f"--save {tmp_path}/checkpoints --save-interval 2 {ASYNC} --train-iters 1000000"
    with log.open("w") as stream:
        process = torchrun(save, stream)
        deadline = time.monotonic() + 180
        while "iteration        5/" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        ranks = process.children(recursive=True)
        process.kill()
    assert len(ranks) >= 4, (ranks, log.read_text())  # the rank, its data worker, its writer, and the manager
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for one in alive:
        one.kill()
    assert alive == []
    assert log.read_text().count(f"error: torchrun (process {process.pid}) is gone") == 1
    assert saved(tmp_path / "checkpoints") >= 2
