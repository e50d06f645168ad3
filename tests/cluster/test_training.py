"""examples/slurm on a real SLURM: whatever happens to a run, it ends as one that nothing disturbed."""

import os
import re
import shutil

import torch

from tests.cluster.hosts import until
from tests.cluster.runs import LAST, ROOT

RANK = "python[0-9.]* -u -m megatron_periln.pretrain"
TORCHRUN = "python[0-9.]* -m torch.distributed.run"


def assert_same(run, reference):
    """Every step of both, also those that a restart repeated, and every weight: bit for bit."""
    curve = {step[0]: step for step in reference.steps}
    assert sorted(curve) == list(range(1, LAST + 1))
    assert [step for step in run.steps if step != curve[step[0]]] == []
    assert {step[0] for step in run.steps} == set(curve)
    assert run.saved == LAST
    ours, theirs = run.weights, reference.weights
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_time_limit(cluster, trainer, undisturbed):
    """Two nodes with two ranks each, warned by SLURM: saved, requeued, and the same as on a single node."""
    layout = "--tensor-model-parallel-size 2 --sequence-parallel"
    number, run = trainer.submit(
        "limit",
        f"{layout} --save-interval 1000",
        "--nodes=2",
        "--time=4",
        "--signal=B:USR1@160",
        slow=6,
        RANKS_PER_NODE="2",
    )
    job = cluster.wait(number)
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0")
    assert job.restarts == len(run.starts) - 1 > 0
    assert all(iteration > 0 for iteration in run.starts[1:])
    assert_same(run, undisturbed(layout, 4))


def changed(folder, name, change):
    """Return a copy of what a job takes along, with a file changed: as ``REPO``, what it is without that."""
    for taken in ("megatron_periln", "examples/slurm"):
        shutil.copytree(ROOT / taken, folder / taken)
    text = change((folder / name).read_text())
    assert text != (ROOT / name).read_text()
    (folder / name).write_text(text)
    return {"REPO": str(folder)}


def test_without_the_trap(cluster, trainer, tmp_path):
    """What the warning does to a script that doesn't listen to it: the ranks are killed while they save."""
    deaf = changed(tmp_path, "examples/slurm/job.sh", lambda text: re.sub("(?m)^trap .*\n", "", text))
    number, run = trainer.submit("deaf", "--save-interval 1000", slow=2, SLOW_SAVE="45", **deaf)
    run.wait_for(2)
    cluster.login("scancel", "--batch", "--signal=USR1", number)
    job = cluster.wait(number)
    assert job.state == "FAILED"
    assert run.saved == 0


def test_killed_rank_and_crashed_node(cluster, trainer, undisturbed):
    """The node check leaves out the node that crashed."""
    number, run = trainer.submit(
        "faults", "--save-interval 4", "--nodes=2", slow=0.7, SLOW_STARTS="2", DOCTOR="1"
    )
    run.wait_for(6)
    cluster.on("node2", "pkill", "-KILL", "-f", RANK)
    run.wait_for(13, start=1)
    cluster.power_off("node2")
    job = cluster.wait(number)
    cluster.start("node2")
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0")
    assert "node2" not in job.nodes
    assert 0 < run.starts[1] < run.starts[2]
    assert_same(run, undisturbed("", 2))
    cluster.wait_for_nodes()


def test_killed_torchrun(cluster, trainer, undisturbed):
    """Its ranks end with it, while they save asynchronously, and their data workers with them."""
    number, run = trainer.submit(
        "launcher",
        "--save-interval 2 --async-save --use-persistent-ckpt-worker",
        "--nodes=2",
        slow=0.7,
    )
    run.wait_for(6)
    cluster.on("node2", "pkill", "-KILL", "-f", f"^[^ ]*{TORCHRUN}")
    run.wait_for(8, start=1)
    assert cluster.on("node2", "pgrep", "-c", "-f", RANK).strip() == "9", (
        "a rank, two workers for each of three datasets, the writer and its queue: none of the killed one's"
    )
    job = cluster.wait(number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", "0:0", 1)
    assert_same(run, undisturbed("", 2))


def test_cancelled_with_a_slow_checkpoint(cluster, trainer, undisturbed):
    """Its save takes longer than torchrun and SLURM wait; a job that depends on it goes on."""
    number, run = trainer.submit("cancelled", "--save-interval 1000", "--nodes=2", slow=1, SLOW_SAVE="45")
    after, _ = trainer.submit(
        "cancelled", "--save-interval 1000", "--nodes=2", f"--dependency=afternotok:{number}"
    )
    run.wait_for(6)
    cluster.login("scancel", "--batch", "--signal=TERM", number)
    job = cluster.wait(number)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", "143:0", 0)
    assert run.saved >= 6
    assert cluster.wait(after).state == "COMPLETED"
    assert len(run.steps) == LAST, "a step was repeated, so the last one was not saved"
    assert_same(run, undisturbed("", 2))


def test_srun_and_asynchronous_saves(cluster, trainer, undisturbed):
    """A rank a task; the save that the warning asks for is whole before the ranks end."""
    number, run = trainer.submit(
        "srun",
        "--save-interval 2 --async-save --use-persistent-ckpt-worker",
        "--nodes=2",
        "--ntasks-per-node=1",
        script="pretrain_srun.sbatch",
        slow=0.5,
    )
    run.wait_for(5)
    cluster.login("scancel", "--batch", "--signal=USR1", number)
    job = cluster.wait(number)
    assert (job.state, job.restarts) == ("COMPLETED", 1)
    assert len(run.steps) == LAST, "a step was repeated, so the last one was not saved"
    assert_same(run, undisturbed("", 2))


def test_bad_node(cluster, trainer, undisturbed, tmp_path):
    """The node check finds the one that has the checkpoints read-only; the job goes elsewhere to train.

    A controller that answers slowly lets SLURM's SIGTERM arrive while the script speaks with it.
    """
    slow = tmp_path / "scontrol"
    slow.write_text(f'#!/bin/sh\nsleep 2\nexec {shutil.which("scontrol")} "$@"\n')
    slow.chmod(0o755)
    name = "bad-node"
    checkpoints = trainer.named(name).folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    cluster.on("node2", "mount", "--bind", checkpoints, checkpoints)
    cluster.on("node2", "mount", "-o", "remount,bind,ro", checkpoints)
    path = f"{tmp_path}:{os.environ['PATH']}"
    number, run = trainer.submit(name, "--save-interval 1000", "--nodes=2", DOCTOR="1", PATH=path)
    job = cluster.wait(number)
    cluster.on("node2", "umount", checkpoints)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", "0:0", 1)
    assert (job.excluded, job.nodes) == ("node2", "node[1,3]")
    said = (trainer.folder / f"{name}.log").read_text()
    assert f"{checkpoints}: cannot be written: Read-only file system" in said
    assert "bad nodes; goes on from iteration 0 without node2" in said
    assert len(run.starts) == 1, "it trained before it had checked"
    assert_same(run, undisturbed("", 2))


def pull_the_cable(cluster, trainer, name, **environment):
    """Start a job with two ranks on a node, and cut that off; return the job's number, its run, the node."""
    flags = "--save-interval 2"
    number, run = trainer.submit(name, flags, "--nodes=1", slow=6, RANKS_PER_NODE="2", **environment)
    run.wait_for(3)
    old = cluster.job(number).batch_host
    cluster.unplug(old)
    until(lambda: len(run.starts) == 2, "the job to start elsewhere", 120)
    return number, run, old


def test_split_brain(cluster, trainer, undisturbed):
    """A cable is pulled: the old ranks live on while the job runs elsewhere, and write nothing more."""
    number, run, old = pull_the_cable(cluster, trainer, "split")
    old_log = run.folder / "jobs" / number / "restart_0" / f"{old}.log"
    until(lambda: "taken over by a newer run" in old_log.read_text(), "the fence", 120)
    cluster.plug(old)
    job = cluster.wait(number)
    assert (job.state, job.restarts) == ("COMPLETED", 1)
    assert job.batch_host != old
    assert_same(run, undisturbed("", 2))
    cluster.wait_for_nodes()


def test_split_brain_without_the_fence(cluster, trainer, tmp_path):
    """The old ranks write over the checkpoints of the new ones, and set the run back."""
    open_gate = "\n\nFence.check = lambda self: None\n"
    unfenced = changed(tmp_path, "megatron_periln/checkpoints/fence.py", lambda text: text + open_gate)
    number, run, old = pull_the_cable(cluster, trainer, "unfenced", **unfenced)
    until(lambda: run.saved == LAST, "the end of the new run", 120)
    until(lambda: run.saved < LAST, "the old run's save", 120)
    cluster.plug(old)
    job = cluster.wait(number)
    assert (job.state, job.restarts) == ("COMPLETED", 1)
    cluster.wait_for_nodes()


def test_sweep(cluster, trainer):
    """An array: one of its tasks is requeued alone, and what depends on the array waits for it."""
    array, _ = trainer.submit(
        "sweep",
        "--save-interval 1000",
        "--array=0-1",
        "--nodes=1",
        script="sweep.sbatch",
        slow=1,
        PLACEMENTS="pre peri",
    )
    after = cluster.submit(f"--dependency=afterok:{array}", "--output=/dev/null", "--wrap=true")
    pre, peri = (trainer.named(f"sweep/{name}_1e-3_1") for name in ("pre", "peri"))
    peri.wait_for(5)
    cluster.login("scancel", "--batch", "--signal=USR1", f"{array}_1")  # has the array's number
    jobs = [cluster.wait(f"{array}_{task}") for task in (0, 1)]
    assert [(job.state, job.restarts) for job in jobs] == [("COMPLETED", 0), ("COMPLETED", 1)]
    assert (pre.saved, peri.saved) == (LAST, LAST)
    assert (len(pre.starts), len(peri.starts)) == (1, 2)
    assert cluster.wait(after).state == "COMPLETED"
