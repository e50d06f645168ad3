"""Evaluation with batches of its own size: every layout finds one process's loss."""

import re

import pytest

from tests.parallel.cases import LAYOUTS, Case
from tests.parallel.conftest import FIRST

ONE = Case("peri")
SIZES = (
    "--eval-micro-batch-size 1 --eval-global-batch-size 6 --eval-iters 2 --skip-train --save-interval 1000"
)


@pytest.fixture(scope="module")
def evaluated(jobs, run):
    """Return the losses on validation and test data of one checkpoint, in a layout."""
    load = run(ONE).folder / "checkpoints"

    def of(layout, sizes=SIZES):
        ranks, flags = LAYOUTS[layout]
        name = re.sub(r"\W+", "-", f"evaluated {layout} {sizes}")
        arguments = f"{ONE.model} {flags} {sizes} --load {load} --ckpt-step {FIRST - 1} --no-load-rng"
        losses = re.findall(r"lm loss value: (\S+)", jobs.run(name, arguments, ranks).log)
        return [float(loss) for loss in losses]

    return of


@pytest.fixture(scope="module")
def expected(evaluated):
    """One process's losses, which don't depend on how the same samples are cut into micro-batches."""
    losses = evaluated("1")
    assert len(losses) == 2 and losses[0] != losses[1]
    assert losses == pytest.approx(evaluated("1", SIZES.replace("size 1", "size 3")), abs=2e-6)
    return losses


@pytest.mark.parametrize("layout", ["TP2+SP", "CP2", "TP2xPP2+SP"])
def test_micro_batches_of_evaluation_are_of_its_own_size(evaluated, expected, layout):
    assert evaluated(layout) == pytest.approx(expected, abs=5e-6)
