"""Dropout draws from each rank's own generator: runs are compared by replay and in the mean."""

import statistics

import pytest

from tests.parallel.cases import Case
from tests.parallel.conftest import FIRST

DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
STEPS, REPLAYED = 12, 5  # the means need as many, a replay does not
REPLAY = f"--exit-interval {FIRST - 1 + REPLAYED}"


def dropped(jobs, run, name, layout, extra=""):
    case = Case("peri", layout=layout)
    load = run(case.one_process).folder / "checkpoints"
    arguments = f"{case.model} {case.execution} {DROPOUT} --load {load} --ckpt-step {FIRST - 1} --no-load-rng"
    arguments += (
        f" --train-iters {STEPS + FIRST - 1} --override-opt-param-scheduler --save-interval 1000 {extra}"
    )
    return jobs.run(f"dropout-{name}", arguments, case.ranks).curve


@pytest.fixture(scope="module")
def curves(jobs, run):
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    return {
        "one": dropped(jobs, run, "one", "1"),
        "without": dropped(jobs, run, "without", "1", "--hidden-dropout 0 --attention-dropout 0"),
        "recomputed": dropped(jobs, run, "recomputed", "1", f"{full} {REPLAY}"),
        "split": dropped(jobs, run, "split", "TP2+SP"),
        "split again": dropped(jobs, run, "split-again", "TP2+SP", REPLAY),
        "split, recomputed": dropped(jobs, run, "split-recomputed", "TP2+SP", f"{full} {REPLAY}"),
    }


@pytest.mark.parametrize(
    ("run_", "replay"), [("split", "split again"), ("split", "split, recomputed"), ("one", "recomputed")]
)
def test_dropout_replays(curves, run_, replay):
    assert len(curves[replay]) == REPLAYED
    assert curves[run_][:REPLAYED] == curves[replay]


def test_dropout_acts(curves):
    assert curves["one"] != curves["without"]
    assert curves["one"] != curves["split"]


def test_split_dropout_has_the_same_mean(curves):
    """Over a dozen steps, layouts are as far apart as noise, and dropout costs both the same."""
    whole = {name: curve for name, curve in curves.items() if len(curve) == STEPS}
    mean = {name: statistics.fmean(point["lm loss"] for point in curve) for name, curve in whole.items()}
    assert mean["one"] > mean["without"] and mean["split"] > mean["without"]
    assert abs(mean["split"] - mean["one"]) < 0.02 * mean["one"]
