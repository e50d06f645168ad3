"""Evaluation with batches of its own size: every layout finds one process's loss."""

import re

import numpy as np
import pytest

from tests.parallel.cases import LAYOUTS, Case
from tests.parallel.conftest import FIRST
from tests.parallel.jobs import COMMON

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


@pytest.fixture(scope="module")
def validated(jobs, run, tmp_path_factory):
    """Return what is printed of one checkpoint's evaluation: which set, its loss; and how many test samples.

    Two validation sets, of 9 and of 5 samples, and one for the test.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder, load = tmp_path_factory.mktemp("sets"), run(ONE).folder / "checkpoints"
    for name, samples in {"a": 9, "b": 5, "test": 6}.items():
        builder = IndexedDatasetBuilder(f"{folder / name}.bin", dtype=np.uint16)
        tokens = np.random.default_rng(samples).integers(0, 255, 64 * samples + 1)
        builder.add_document(tokens, [len(tokens)])
        builder.finalize(f"{folder / name}.idx")

    def of(layout, flags, sets="a b"):
        ranks, flags_of_layout = LAYOUTS[layout]
        sizes = "--eval-micro-batch-size 1 --eval-global-batch-size 4 --skip-train --save-interval 1000"
        paths = {"train": "a", "valid": sets, "test": "test"}
        for part, names in paths.items():
            sizes += f" --{part}-data-path {' '.join(str(folder / name) for name in names.split())}"
        arguments = f"{ONE.model} {flags_of_layout} {sizes} {flags} --load {load} --ckpt-step {FIRST - 1}"
        name = re.sub(r"\W+", "-", f"validated {layout} {sets} {flags}")
        common = COMMON.replace("--split 90,5,5", "")
        log = jobs.run(name, f"{arguments} --no-load-rng", ranks, common=common).log
        losses = re.findall(r" validation(\S*) loss at iteration \d+ on (\w+) set .*?value: (\S+)", log)
        return {which + suffix: float(loss) for suffix, which, loss in losses}, log

    return of


def test_full_validation_reads_every_sample_of_every_set_and_the_test_eval_iters_batches(validated):
    """Megatron fails: at the first evaluation of one dataset, or at the test, or with virtual stages."""
    full = "--full-validation --eval-iters 1"
    losses, log = validated("1", f"{full} --multiple-validation-sets")
    assert losses.keys() == {"validation-0", "validation-1", "test"}
    assert "Evaluating on 4 samples" in log  # of the test, and not as many as of validation
    for number, (name, samples) in enumerate({"a": 9, "b": 5}.items()):
        alone, _ = validated("1", full, name)
        assert alone == {"validation": losses[f"validation-{number}"], "test": losses["test"]}
        some, _ = validated("1", f"--eval-iters {samples} --eval-global-batch-size 1", name)
        assert alone["validation"] == pytest.approx(some["validation"], abs=2e-6)
    assert "Evaluating on 9 samples" in log and "Evaluating on 5 samples" in log
    spread, _ = validated("PP2xVPP2", f"{full} --multiple-validation-sets")
    assert spread == pytest.approx(losses, abs=5e-6)
    shared, _ = validated("DP2", f"{full} --multiple-validation-sets")
    assert shared == pytest.approx(losses, abs=5e-6)
    both, _ = validated("DP2", full, "a a b")  # 23 samples in one blend
    assert both["validation"] == pytest.approx(
        (18 * losses["validation-0"] + 5 * losses["validation-1"]) / 23, abs=5e-6
    )
