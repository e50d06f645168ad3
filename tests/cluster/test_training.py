"""examples/slurm on a real SLURM cluster: whatever happens to a run, it ends as one that nothing disturbed."""

import pytest
import torch

from tests.cluster.runs import LAST

pytestmark = pytest.mark.cluster

LAYOUT = "--tensor-model-parallel-size 2 --sequence-parallel"


def assert_same(run, reference):
    """Every step of both, also those that a restart repeated, and every weight: bit for bit."""
    curve = dict((step[0], step) for step in reference.steps)
    assert sorted(curve) == list(range(1, LAST + 1))
    assert [step for step in run.steps if step != curve[step[0]]] == []
    assert {step[0] for step in run.steps} == set(curve)
    assert run.saved == LAST
    ours, theirs = run.weights, reference.weights
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_time_limit(cluster, trainer, undisturbed):
    """Two nodes, warned before the time limit: the run is saved, goes on, and equals a single node's."""
    number, run = trainer.submit(
        "limit",
        f"{LAYOUT} --save-interval 1000",
        "--nodes=2",
        "--signal=B:USR1@120",
        "--time=3",
        slow=3,
        RANKS_PER_NODE="2",
    )
    job = cluster.wait(number)
    print(job, (trainer.folder / "limit.log").read_text())
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0")
    assert job.restarts == len(run.starts) - 1 > 0
    assert_same(run, undisturbed(LAYOUT, 4))
