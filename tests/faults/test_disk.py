"""Disks, mounted for the test, that become read-only or hang."""

import pytest

from tests.faults.test_damage import TRACKER, choose
from tests.faults.test_fencing import ONE_BY_ONE
from tests.parallel.test_checkpoints import ASYNC
from tests.training.model import MODEL

FLAGS = f"{MODEL} --save-interval 2"


def train_on(jobs, disk, name, flags, accident, **others):
    return jobs.run(
        name,
        f"{FLAGS} --save {disk}/checkpoints {flags}",
        2,
        changes=[ONE_BY_ONE, f"tests.faults.accidents.{accident}"],
        environment={"DISK": str(disk), **others},
        succeeds=None,
    )


@pytest.mark.parametrize("saving", ["", ASYNC], ids=["", "async"])
def test_a_disk_that_becomes_read_only(jobs, disk, saving):
    job = train_on(jobs, disk, f"read-only{'-async' if saving else ''}", saving, "read_only")
    checkpoints = disk / "checkpoints"
    assert job.exit_codes == [1, 1], job.log
    assert "Traceback" not in job.log
    (error,) = [line for line in job.log.splitlines() if line.startswith("error:")]
    assert error.startswith(f"error: {checkpoints}/iter_0000004: cannot be written: Read-only file system; ")
    assert error.endswith("what latest_checkpointed_iteration.txt names is complete")
    assert (checkpoints / TRACKER).read_text() == "2"
    assert choose(checkpoints) is None


def test_a_disk_that_hangs_for_a_while(jobs, disk):
    job = train_on(jobs, disk, "slow", "", "hangs", SECONDS="7")
    assert job.exit_codes == [0, 0], job.log
    said = [line for line in job.log.splitlines() if "is not on the disk" in line]
    assert [line.split(";")[0] for line in said] == [
        f"--save {disk}/checkpoints: iter_0000004 is not on the disk after {seconds} s" for seconds in (3, 6)
    ]
    assert choose(disk / "checkpoints") is None
    assert (disk / "checkpoints" / TRACKER).read_text() == "6"


def test_a_disk_that_hangs(jobs, disk):
    job = train_on(jobs, disk, "hung", "", "hangs", SECONDS="18")
    assert any(job.exit_codes), job.log
    assert job.log.count("is not on the disk") == 3
    (error,) = [line for line in job.log.splitlines() if line.startswith("error:")]
    assert "a rank has waited 0.2 minutes" in error
    assert choose(disk / "checkpoints") is None
