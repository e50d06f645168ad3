"""A run that stops and resumes is the run that does not stop, bit for bit."""

import pytest
import torch

from tests.parallel.jobs import COMMON
from tests.training.model import MODEL

# Dropout, so that the random state matters, which COMMON leaves out of checkpoints.
SAVING_RANDOM_STATE = COMMON.replace("--no-save-rng", "")
DROPOUT = f"{MODEL} --norm-placement peri --hidden-dropout 0.1 --attention-dropout 0.1"


@pytest.fixture(scope="module", params=["adam", "distributed optimizer"])
def runs(request, jobs):
    """Runs jobs in a folder of the optimizer's; with those that went straight and stopped midway."""
    optimizer = {"adam": "", "distributed optimizer": "--use-distributed-optimizer"}[request.param]

    def run(name, arguments):
        name = f"{request.param.split()[0]}-{name}"
        return jobs.run(name, f"{DROPOUT} {optimizer} {arguments}", common=SAVING_RANDOM_STATE)

    run.straight = run("straight", "")
    run.stopped = run("stopped", "--exit-interval 3")
    run.load = f"--load {run.stopped.folder / 'checkpoints'}"
    return run


def iterations(job):
    return [point["iteration"] for point in job.curve]


def test_resumed_run_is_the_straight_one_to_the_bit(runs):
    resumed = runs("resumed", runs.load)
    assert iterations(runs.stopped) == [1, 2, 3]
    assert iterations(resumed) == [4, 5, 6]
    assert runs.stopped.curve + resumed.curve == runs.straight.curve
    weights, expected = resumed.weights(6), runs.straight.weights(6)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("without", ["--no-load-rng", "--no-load-optim"])
def test_what_is_not_loaded_makes_a_difference(runs, without):
    resumed = runs(f"resumed{without}", f"{runs.load} {without}")
    assert iterations(resumed) == [4, 5, 6]
    assert resumed.curve[-1]["lm loss"] != runs.straight.curve[-1]["lm loss"]


def test_dropout_draws_from_the_seed(runs):
    reseeded = runs("reseeded", f"{runs.load} --seed 4321 --no-load-rng --allow-data-changes")
    assert reseeded.curve[-1]["lm loss"] != runs.straight.curve[-1]["lm loss"]
