"""--rampup-batch-size trains with the batch sizes that it asks for."""

import re
from argparse import Namespace
from importlib.util import find_spec

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.training import parsing
from megatron_periln.training.batch_sizes import accept_the_last_size, check_batch_sizes, translate_rampup
from tests.training import flag_trials
from tests.training.model import MODEL

RAMP = f"{MODEL} --global-batch-size 6 --rampup-batch-size 2 2 24 --train-iters 11 --save-interval 8"


def batch_sizes(job):
    """Return ``{samples consumed before: global batch size}`` of a job's iterations."""
    found = re.findall(r"consumed samples: +(\d+) .*?global batch size: +(\d+)", job.log)
    return {int(samples) - int(size): int(size) for samples, size in found}


def test_batches_grow_as_asked_and_go_on_growing_after_a_resume(jobs):
    straight = jobs.run("ramp", RAMP)
    assert "--rampup-batch-size 2 2 24, which megatron-core ignores, becomes" in straight.log
    sizes = batch_sizes(straight)
    assert sizes == {0: 2, 2: 2, 4: 2, 6: 2, 8: 2, 10: 2, 12: 4, 16: 4, 20: 4, 24: 6, 30: 6}
    load = f"--load {straight.folder / 'checkpoints'} --ckpt-step 8 --no-load-rng"
    resumed = jobs.run("ramp-resumed", f"{RAMP} {load}")
    assert batch_sizes(resumed) == {samples: size for samples, size in sizes.items() if samples >= 20}
    assert resumed.curve == straight.curve[8:]


def test_the_ramp_of_a_recipe(jobs):
    """Apertus's, shrunk: megatron-core alone trains with 8 from the start."""
    flags = "--global-batch-size 8 --rampup-batch-size 4 4 8 --train-iters 3"
    assert batch_sizes(jobs.run("ramp-of-a-recipe", f"{MODEL} {flags}")) == {0: 4, 4: 4, 8: 8}


@pytest.mark.skipif(find_spec("nvidia_resiliency_ext") is None, reason="no nvidia-resiliency-ext here")
def test_two_ranks_go_on_from_local_checkpoints_where_the_schedule_is(jobs):
    """With micro-batches that the first batch size of the schedule, which is behind, could not have."""
    saves = "--non-persistent-save-interval 4 --non-persistent-ckpt-type local"
    ramp = f"{MODEL} --global-batch-size 4 --rampup-batch-size 2 2 4 --train-iters 6 --micro-batch-size 1"
    straight = jobs.run("local", f"{ramp} {saves} --non-persistent-local-ckpt-dir {jobs.folder / 'disk'}", 2)
    assert list(batch_sizes(straight).values()) == [2, 2, 4, 4, 4, 4]
    disk = f"--non-persistent-local-ckpt-dir {jobs.folder / 'disk'} --load {jobs.folder / 'none'}"
    for size in (1, 2):
        resumed = jobs.run(
            f"local-{size}", f"{ramp} --micro-batch-size {size} {saves} {disk} --no-load-rng", 2
        )
        assert [point["iteration"] for point in resumed.curve] == [5, 6]
        losses = [point["lm loss"] for point in resumed.curve]
        assert losses == pytest.approx([point["lm loss"] for point in straight.curve[4:]], abs=2e-6)


@pytest.mark.parametrize(("from_local", "refused"), [(True, False), (False, True)])
def test_a_local_checkpoint_says_later_which_sizes_are_to_come(monkeypatch, tmp_path, from_local, refused):
    """Its samples are not known before it is loaded: all sizes were taken for sizes to come."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(parsing, "choose_intact_checkpoint", lambda args: from_local)
    flags = "--norm-placement peri --micro-batch-size 4 --step-batch-size-schedule 0:2␣32:4"
    flags = f"~--global-batch-size ~--micro-batch-size {flags}"
    if not refused:
        flag_trials.parse(flags)
        return
    with pytest.raises(UsageError, match="the global batch size of 2 after 0 samples is not divisible"):
        flag_trials.parse(flags)


def arguments(**changes):
    given = {"rampup_batch_size": ["2", "2", "24"], "global_batch_size": 6, "seq_length": 64}
    given |= {"step_batch_size_schedule": None, "decrease_batch_size_if_needed": False}
    return Namespace(**given | changes)


def test_the_steps_are_those_of_the_megatron_that_read_the_flag():
    """Which took START + INCREMENT * int(samples / (SAMPLES / steps)), until it was the global batch size."""
    args = arguments(rampup_batch_size=["16", "8", "3000"], global_batch_size=72, seq_length=10)
    assert len(translate_rampup(args)) == 1
    steps = [tuple(map(int, step.split(":"))) for step in args.step_batch_size_schedule.split()]
    for samples in range(3100):
        theirs = 72 if samples > 3000 else 16 + 8 * int(samples / (3000 / 7))
        assert [size for start, size in steps if start <= 10 * samples][-1] == theirs


@pytest.mark.parametrize(
    ("schedule", "size", "agree"),
    [
        ("0:2 1K:6", 6, True),
        ("0:6", 6, True),
        ("0:2 1K:16", 6, False),
        ("0:6 1K:2", 6, False),
        ("", 6, False),
    ],
)
def test_the_global_batch_size_may_be_the_schedule_s_last(schedule, size, agree):
    args = arguments(rampup_batch_size=None, step_batch_size_schedule=schedule, global_batch_size=size)
    args._is_global_batch_size_explicitly_specified = True
    assert bool(accept_the_last_size(args)) is agree
    assert args._is_global_batch_size_explicitly_specified is not agree


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"global_batch_size": None}, "needs --global-batch-size"),
        ({"global_batch_size": 7}, "2 2 24 does not lead to --global-batch-size 7"),
        ({"rampup_batch_size": [8, 2, 24]}, "does not lead to --global-batch-size 6"),
        ({"rampup_batch_size": [2, 2, 1]}, "its 2 increments need 2 samples or more"),
        ({"step_batch_size_schedule": "0:2"}, "say the same twice"),
        ({"decrease_batch_size_if_needed": True}, "can't be combined with --decrease-batch-size-if-needed"),
    ],
)
def test_what_is_no_ramp_is_refused(changes, error):
    with pytest.raises(UsageError, match=error):
        translate_rampup(arguments(**changes))


def test_no_ramp_is_left_alone():
    args = arguments(rampup_batch_size=None)
    assert translate_rampup(args) == []
    assert args.step_batch_size_schedule is None


@pytest.mark.parametrize(
    ("schedule", "error"),
    [
        ("0:2 640:3", "global batch size of 3 after 10 samples is not divisible"),
        ("640:4", "must say the batch size from 0 on"),
        ("0:2 0:4", "two batch sizes after 0 samples"),
        ("0-2", "--step-batch-size-schedule: Invalid schedule entry"),
    ],
)
def test_a_batch_size_that_cannot_be_split_is_refused_before_it_begins(schedule, error):
    args = arguments(step_batch_size_schedule=schedule, micro_batch_size=2, data_parallel_size=1)
    args.gtp_weight_remat_size = 1
    with pytest.raises(UsageError, match=error):
        check_batch_sizes(args, 0)


def test_batch_sizes_of_the_past_need_not_be_split():
    args = arguments(step_batch_size_schedule="0:1 640:4", micro_batch_size=2, data_parallel_size=1)
    args.gtp_weight_remat_size = 1
    check_batch_sizes(args, 10)
    with pytest.raises(UsageError):
        check_batch_sizes(args, 9)
