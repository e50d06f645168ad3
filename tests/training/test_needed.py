"""What a run can't be without is named before anything is built, all of it at once."""

import functools
import inspect

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.megatron_arguments import megatron_arguments
from megatron_periln.rules import refuse
from megatron_periln.training.checks import SIZES
from megatron_periln.training.idle_flags import is_idle
from megatron_periln.training.parsing import add_arguments
from megatron_periln.training.refusals.needed import NEEDED, SCHEDULE

MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 64"
REST = f"{MODEL} --seq-length 64 --micro-batch-size 2"
RUN = f"{REST} --lr 1e-3"

FITTING = [
    f"{RUN} --train-iters 4",
    f"{RUN} --train-samples 8 --lr-decay-style WSD --lr-wsd-decay-samples 2 --lr-warmup-samples 7",
    f"{RUN} --train-iters 4 --global-batch-size 6 --lr-warmup-fraction 0.5 --lr-decay-iters 2",
    f"{RUN} --train-iters 4 --global-batch-size 5 --decrease-batch-size-if-needed",
    f"{MODEL} --encoder-seq-length 64 --micro-batch-size 2 --skip-train",
    f"{RUN} --train-iters 4 --per-split-data-args-path parts.json --data-args-path list.txt",
    f"{RUN} --train-iters 4 --data-cache-path a/b --spec megatron.core.models.mamba.mamba_layer_specs "
    "mamba_stack_spec",
    "--use-checkpoint-args --load x --micro-batch-size 2 --lr 1 --train-iters 4",
]
BROKEN = {
    "--train-iters 2 --lr 1e-3 --micro-batch-size 1": "--num-layers, --hidden-size, --num-attention-heads, "
    "--seq-length, --max-position-embeddings are missing",
    f"{MODEL} --micro-batch-size 1 --lr 1e-3 --train-iters 2": "--seq-length is missing",
    REST: "--lr is missing.*\n.*--train-iters is missing: give it, or --train-samples",
    f"{RUN} --train-iters 2 --train-samples 8 --lr-warmup-samples 4": "two lengths of the run; give one",
    f"{RUN} --train-iters 9 --lr-decay-iters 5 --lr-warmup-iters 5": r"--lr-warmup-iters \(5\) must be less "
    r"than --lr-decay-iters \(5\)",
    f"{RUN} --train-samples 4 --lr-warmup-samples 5": r"must be less than --train-samples \(4\)",
    f"{RUN} --train-iters 2 --lr-warmup-fraction 1": "--lr-warmup-fraction",
    f"{RUN} --train-iters 2 --lr-decay-style WSD": "needs --lr-wsd-decay-iters",
    f"{RUN} --train-iters 2 --min-lr 1e-2": "--min-lr .* must be at most --lr",
    f"{RUN} --train-iters 2 --lr-warmup-init 1e-2": "--lr-warmup-init .* must be at most --lr",
    f"{RUN} --train-iters 2 --fp16 --bf16": "--fp16 and --bf16",
    f"{RUN} --train-iters 2 --global-batch-size 5": r"--global-batch-size \(5\) must be divisible by "
    r"--micro-batch-size x data-parallel size \(2\)",
    f"{RUN} --train-iters 2 --start-weight-decay 2 --end-weight-decay 1": "weight decay only grows",
    f"{RUN} --train-iters 2 --override-opt_param-scheduler "
    "--use-checkpoint-opt_param-scheduler": "contradict",
    f"{RUN} --train-iters 2 --data-cache-path list.txt/cache": "--data-cache-path .* can't be made in ",
    f"{RUN} --train-iters 2 --spec no.such specs": "--spec no.such specs: cannot be imported: No module",
    f"{RUN} --train-iters 2 --spec megatron.core no_specs": "--spec megatron.core no_specs: the module has",
    f"{RUN} --train-iters 2 --spec local": "--spec local: takes two words",
    f"{RUN} --train-iters 2 --data-args-path nope": "--data-args-path nope: cannot be read",
    f"{RUN} --train-iters 2 --per-split-data-args-path two.json": "two.json: not JSON with train, valid and",
}


_source = functools.cache(inspect.getsource)


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Check flags in a folder with the files that they name."""
    # Megatron takes its flags' help from its sources, for each parser: most of a second.
    monkeypatch.setattr(inspect, "getsource", _source)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts.json").write_text('{"train": ["a"], "valid": "1 b", "test": null}')
    (tmp_path / "two.json").write_text('{"train": ["a"], "valid": ["b"]}')
    (tmp_path / "list.txt").write_text("a")

    def run(flags):
        refuse(megatron_arguments(flags.split(), add_arguments), (*NEEDED, *SIZES, *SCHEDULE))

    return run


@pytest.mark.parametrize("flags", FITTING)
def test_enough_is_enough(check, flags):
    check(flags)


@pytest.mark.parametrize(("flags", "error"), BROKEN.items(), ids=BROKEN.values())
def test_what_is_missing_or_can_not_be_followed_is_named(check, flags, error):
    with pytest.raises(UsageError, match=error) as caught:
        check(flags)
    assert str(caught.value).count("\n") == (2 if "\n" in error else 0)


def test_flags_that_another_takes_the_place_of_are_idle():
    args = megatron_arguments(
        f"{RUN} --train-iters 4 --recompute-activations --recompute-granularity full "
        "--lr-decay-style WSD".split(),
        add_arguments,
    )
    assert is_idle("recompute_granularity", args)
    assert is_idle("lr_wsd_decay_samples", args)
    assert not is_idle("lr_wsd_decay_iters", args)
    assert not is_idle("encoder_seq_length", args)  # Megatron's sequence length, where that is not given
