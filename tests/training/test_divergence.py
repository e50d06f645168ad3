"""A run that diverges says so once: when, what, where, and what to do; its checkpoints stay usable."""

import logging
import os
import re
import sys
from argparse import Namespace

import pytest
import torch

from megatron_periln.training.divergence import Divergence, DivergenceError
from tests.training.model import MODEL

FLAGS = f"{MODEL} --mock-data --norm-placement pre --save-interval 2"
DIVERGES = "--lr 1e6 --min-lr 0 --lr-warmup-iters 0 --lr-decay-style constant"
ADVICE = ("smaller --lr (now ", "another --norm-placement than pre", "--monitor-layers")
TRACKER = "latest_checkpointed_iteration.txt"


def without_save():
    at = sys.argv.index("--save")
    del sys.argv[at : at + 2]


def spoil():
    """A weight of the last rank becomes NaN in the third step."""
    from megatron.training import training

    step = training.train_step

    def spoiling(*args, iteration, **kwargs):
        result = step(*args, iteration=iteration, **kwargs)
        if iteration == 2 and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            with torch.no_grad():
                next(args[2][0].parameters()).view(-1)[0] = float("nan")
        return result

    training.train_step = spoiling


def one_line(job):
    """The one line of all ranks on standard error, apart from its advice."""
    (line,) = [line for line in job.log.splitlines() if line.startswith("error:")]
    assert all(part in line for part in ADVICE), line
    assert "Traceback" not in job.log
    assert "Unexpected result" not in job.log
    return line.partition(" If training has diverged")[0]


NODE = re.escape(os.uname().nodename)
PLACE = re.compile(r"error: iteration (\d+): (.*)")


@pytest.mark.parametrize(
    ("name", "flags", "ranks", "changes", "statuses", "said"),
    [
        (
            "saved",
            DIVERGES,
            1,
            (),
            [16],
            rf"the gradient norm of bucket 0 is nan on rank 0 \({NODE}\), and again when the step is "
            r"repeated; the weights before it are saved: iteration 2 of --save \S+/checkpoints\.",
        ),
        (
            "unsaved",
            DIVERGES,
            2,
            ["without_save"],
            [17, 17],
            rf"the gradient norm of bucket 0 is nan on rank 0 \({NODE}\), with 1 more ranks, and again when "
            "the step is repeated; it is not saved.",
        ),
        (
            "spoiled",
            "--pipeline-model-parallel-size 2",
            2,
            ["spoil"],
            [17, 17],
            rf"the loss is nan on rank 1 \({NODE}\), with 1 more ranks, and again when .*; weights are not "
            "finite any more, and not saved: go on from an earlier checkpoint.",
        ),
        (
            "disabled",
            "--pipeline-model-parallel-size 2 --rerun-mode disabled",
            2,
            ["spoil", "without_save"],
            [1, 1],
            rf"the loss is nan on rank 1 \({NODE}\); it is not saved.",
        ),
        (
            "injected",
            "--error-injection-rate 3 --error-injection-type transient_error",
            1,
            (),
            [17],
            r"the .*, but not when the step is repeated: the hardware may be at fault; it is not saved.",
        ),
    ],
)
def test_nan(jobs, name, flags, ranks, changes, statuses, said):
    job = jobs.run(
        f"nan-{name}",
        f"{FLAGS} {flags}",
        ranks,
        changes=[f"tests.training.test_divergence.{change}" for change in changes],
        succeeds=False,
    )
    assert job.exit_codes == statuses, job.log
    last = max(int(number) for number in re.findall(r"iteration +(\d+)/", job.log))
    iteration, what = PLACE.fullmatch(one_line(job)).groups()
    assert int(iteration) == last + 1
    assert re.fullmatch(said, what), what
    tracker = job.folder / "checkpoints" / TRACKER
    if name != "injected":
        assert not tracker.exists() if "without_save" in changes else tracker.read_text() == "2"


def test_a_run_that_goes_on_repeats_the_step(jobs):
    """On the GPU that it was on, which tells nothing."""
    first = jobs.run("nan-first", f"{FLAGS} {DIVERGES}", succeeds=False)
    assert first.exit_codes == [16]
    load = f"--load {first.folder}/checkpoints"
    again = jobs.run("nan-again", f"{FLAGS} {DIVERGES} {load}", succeeds=False)
    assert again.exit_codes == [16], again.log
    (line, *_), (other, *_) = (one_line(job).split(", and again") for job in (first, again))
    assert other.partition("; to compare it, start again on another GPU; it is not saved.")[0] == line


def evaluate(message):
    """Be where Megatron is as it evaluates, by name."""
    raise RuntimeError(message)


@pytest.mark.parametrize(("function", "where"), [(evaluate, " in the evaluation after it"), (None, "")])
def test_a_nan_that_is_an_error(monkeypatch, function, where):
    """With ``--rerun-mode disabled``, and wherever Megatron evaluates."""
    monkeypatch.setattr("megatron_periln.patches.training_loop.before_exit", lambda decide: None)
    args = Namespace(rank=0, world_size=1, curr_iteration=4, lr=1e-3, norm_placement="peri", save=None)
    message = (
        "Rank 0, node a, device 0, iteration 7: Unexpected result nan (message='found NaN in local forward "
    )
    said = rf"iteration 5: the loss is nan on rank 0 \({NODE}\){where}; it is not saved"
    with pytest.raises(DivergenceError, match=said) as info, Divergence(args).in_one_line():
        (function or train)(f"{message}loss calculation')")
    assert info.value.status == 1
    with pytest.raises(RuntimeError, match="another"), Divergence(args).in_one_line():
        evaluate("another")


def train(message):
    raise RuntimeError(message)


@pytest.mark.parametrize(
    ("level", "text", "kept"),
    [
        (logging.ERROR, "Unexpected result nan on rank 0 at iteration #4 (message='found NaN in x')", None),
        (logging.ERROR, "Rank 0, node a, device 0, iteration #4: First rerun: reproducible!", None),
        (logging.WARNING, "Saving a checkpoint and exiting now. Please resume the job", None),
        (
            logging.ERROR,
            "Unexpected result 99 on rank 0 at iteration #4 (message='Spiky loss')",
            "Unexpected result 99 on rank 0 at iteration #3 (message='Spiky loss')",
        ),
    ],
)
def test_the_log_has_the_iteration_and_nothing_twice(monkeypatch, level, text, kept):
    """Megatron's count is another, and differs between a run from the start and one that goes on."""
    monkeypatch.setattr("megatron_periln.patches.training_loop.before_exit", lambda decide: None)
    logger = logging.getLogger("megatron.core.rerun_state_machine")
    before = list(logger.filters)
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    try:
        Divergence(Namespace(curr_iteration=2))
        logger.log(level, text)
    finally:
        logger.removeHandler(handler)
        logger.filters[:] = before
    assert seen == ([kept] if kept else [])
