"""``--norm-backend triton`` in parallel training, interpreted: layouts, recomputation, dropout."""

import re

import pytest

from tests.parallel.cases import Case
from tests.parallel.compare import FP32, tensors_apart
from tests.parallel.conftest import FIRST

DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# Interpreted kernels are slow: a step or two, of few tokens where nothing else is compared with.
BRIEF = "--eval-iters 0 --save-interval 1000 --exit-interval"
SMALL = "--global-batch-size 2 --seq-length 16 --allow-data-changes --override-opt-param-scheduler"
QUICK = "tests.norms.interpreter.repeat_less"
FIRST_DROPPED = "tests.parallel.dropped_elements.print_first"


def trained(jobs, run, name, layout, arguments, *, steps=1, changes=()):
    case = Case("peri", layout=layout)
    load = run(case.one_process).folder / "checkpoints"
    resumed = f"--load {load} --ckpt-step {FIRST - 1} --no-load-rng {BRIEF} {FIRST + steps - 1}"
    return jobs.run(
        f"backend-{name}",
        f"{case.model} {case.execution} {resumed} {arguments}",
        case.ranks,
        changes=[QUICK, *changes],
    )


def test_the_fused_kernel_in_tensor_and_sequence_parallelism_gives_one_processs_numbers(jobs, run):
    one = run(Case("peri"))
    arguments = f"--norm-backend triton --save-wgrads-interval {FIRST}"
    split = trained(jobs, run, "layout", "TP2+SP", arguments, steps=2)
    assert len(split.curve) == 2
    for mine, theirs in zip(split.curve, one.curve[FIRST - 1 :], strict=False):
        assert mine["iteration"] == theirs["iteration"]
        assert mine["lm loss"] == pytest.approx(theirs["lm loss"], rel=FP32["loss"])
        assert mine["grad norm"] == pytest.approx(theirs["grad norm"], rel=FP32["grad_norm"])
    apart = tensors_apart(split.gradients, one.gradients, relative=True)
    assert max(apart.values()) < FP32["gradients"]


@pytest.mark.parametrize("layout", ["1", "TP2+SP"])
def test_dropout_replays_in_recomputation(jobs, run, layout):
    plain, recomputed = (
        trained(
            jobs,
            run,
            f"replay-{layout}-{bool(way)}",
            layout,
            f"--norm-backend triton {DROPOUT} {SMALL} {way}",
            steps=2,
        ).curve
        for way in ("", FULL)
    )
    assert plain == recomputed and len(plain) == 2


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("layout", "alike"), [("TP2", True), ("TP2+SP", False)])
def test_ranks_drop_the_same_elements_where_they_hold_the_same_tokens(jobs, run, backend, layout, alike):
    arguments = f"--norm-backend {backend} {DROPOUT} {SMALL}"
    job = trained(jobs, run, f"ranks-{backend}-{layout}", layout, arguments, changes=[FIRST_DROPPED])
    digests = re.findall(r"^dropped (\w+) 0\.\d+$", job.log, re.MULTILINE)
    assert len(digests) == 2
    assert (digests[0] == digests[1]) == alike


def test_the_log_tells_which_backend_was_taken_and_why(jobs, run):
    asked = trained(jobs, run, "asked", "1", f"--norm-backend triton {SMALL}").log
    assert "norm backend: triton (as asked for)" in asked
    assert "norm backend: torch (there are no fused kernels for the CPU)" in run(Case("peri")).log
