"""Ranks that live on after their job was requeued write no checkpoint that counts."""

import json

import pytest

from tests.parallel.test_checkpoints import ASYNC
from tests.training.model import MODEL

ONE_BY_ONE = "tests.faults.accidents.one_save_at_a_time"
JOB = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "0"}


@pytest.mark.parametrize("saving", ["", ASYNC], ids=["", "async"])
@pytest.mark.parametrize(
    ("accident", "last", "folders"),
    [("superseded_before_saving", "4", {2, 4}), ("superseded_while_saving", "2", {2, 4})],
)
def test_the_old_ranks_stop_with_one_error(jobs, accident, last, folders, saving):
    job = jobs.run(
        f"{accident}{'-async' if saving else ''}",
        f"{MODEL} --save-interval 2 {saving}",
        2,
        changes=[ONE_BY_ONE, f"tests.faults.accidents.{accident}"],
        environment=JOB,
        succeeds=False,
    )
    checkpoints = job.folder / "checkpoints"
    assert job.exit_codes == [1, 1], job.log
    assert "Traceback" not in (job.folder / "rank0.log").read_text()
    errors = [line for line in job.log.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "was taken over by a newer run: job 17, restart 1 (on node7" in errors[0]
    assert "this one, job 17, restart 0" in errors[0]
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == last
    assert {int(path.name[5:]) for path in checkpoints.glob("iter_*")} == folders
    assert not list(checkpoints.glob("*.tmp"))
    assert ("successfully saved checkpoint from iteration       4" in job.log) == (last == "4")


def test_a_job_that_fails_while_starting_leaves_the_folder_to_its_holder(jobs):
    """Here at the checkpoint's schedule, after the model was built; one that trains takes it."""
    flags = f"{MODEL} --save-interval 2"
    holder = jobs.run("holder", flags, environment=JOB)
    checkpoints = holder.folder / "checkpoints"
    (ticket,) = checkpoints.glob("incarnation-*.json")
    there = f"{flags} --load {checkpoints} --save {checkpoints}"
    failing, other = f"{there} --lr-decay-iters 77", {"SLURM_JOB_ID": "18", "SLURM_RESTART_COUNT": "0"}
    failed = jobs.run("failed", failing, environment=other, succeeds=False)
    assert "trained with another schedule" in failed.log
    assert list(checkpoints.glob("incarnation-*.json")) == [ticket]
    assert json.loads(ticket.read_text())["holder"]["name"] == "job 17, restart 0"
    jobs.run("trains", f"{there} --train-iters 7 --override-opt-param-scheduler", environment=other)
    (ticket,) = checkpoints.glob("incarnation-*.json")
    assert json.loads(ticket.read_text())["holder"]["name"] == "job 18, restart 0"
