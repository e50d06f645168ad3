"""A run that goes on with another learning rate: the flags say whether theirs or the checkpoint's counts."""

import re

import pytest

from tests.training.model import MODEL

RATES = "--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine"
OTHER = "--lr 4e-3 --min-lr 2e-4 --lr-decay-style cosine"
MUP = "--use-mup --mup-base-hidden-size 16 --mup-base-head-dim 4"


@pytest.fixture(scope="module", params=["adam", "distributed optimizer", "bf16", "mup"])
def runs(request, jobs):
    """Runs jobs in a folder of the optimizer's, and has run one straight, to load what it saved midway."""
    kind = {"adam": "", "distributed optimizer": "--use-distributed-optimizer", "bf16": "--bf16", "mup": MUP}

    def run(name, arguments, **more):
        return jobs.run(
            f"schedule-{request.param.split()[0]}-{name}",
            f"{MODEL} {kind[request.param]} {arguments}",
            **more,
        )

    run.straight = run("straight", f"{RATES} --save-interval 3")
    run.load = f"--load {run.straight.folder / 'checkpoints'} --ckpt-step 3"
    return run


def rates(job):
    lines = re.findall(r"iteration +(\d+)/.* learning rate: (\S+) ", job.log)
    return {int(iteration): rate for iteration, rate in lines}


@pytest.mark.parametrize(
    ("flag", "counts"),
    [("--override-opt-param-scheduler", OTHER), ("--use-checkpoint-opt-param-scheduler", RATES)],
    ids=["the flags'", "the checkpoint's"],
)
def test_the_rate_that_counts(runs, flag, counts):
    resumed = rates(runs(flag, f"{OTHER} {runs.load} {flag}"))
    straight = rates(runs.straight if counts == RATES else runs("straight-otherwise", counts))
    assert list(resumed) == [4, 5, 6]
    assert resumed == {iteration: straight[iteration] for iteration in resumed}
    assert len(set(resumed.values())) == 3


def test_without_a_word_it_is_refused(runs):
    job = runs("refused", f"{OTHER} {runs.load}", succeeds=False)
    assert "error: the checkpoint was trained with another schedule (--lr gave " in job.log
    assert "--override-opt-param-scheduler" in job.log
