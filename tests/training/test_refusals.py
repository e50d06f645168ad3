"""What is a refusal, and what a fault: only the first loses its traceback."""

import argparse
import importlib
import re
import threading
from pathlib import Path

import megatron
import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_periln.checkpoints import rendezvous
from megatron_periln.cpu import cuda_surface
from megatron_periln.errors import RankError, UsageError
from megatron_periln.models.place_norms import place_norms
from megatron_periln.norms import PERI
from megatron_periln.training.refusals import refusals_in_one_line, why_refused
from megatron_periln.training.refusals.one_line import one_line


def caught(function, *args, **kwargs):
    with pytest.raises(Exception) as info:
        function(*args, **kwargs)
    return info.value


def schedule(**changes):
    steps = {"lr_warmup_steps": 2, "lr_decay_steps": 10, "lr_decay_style": "constant", **changes}
    weight_decay = {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 10, "wd_incr_style": "constant"}
    return OptimizerParamScheduler(None, init_lr=0.0, max_lr=1e-3, min_lr=0.0, **steps, **weight_decay)


def config(**changes):
    return TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, **changes)


def refuse_in_place_norms():
    place_norms(None, PERI, config(inference_fuse_tp_communication=True))


REFUSALS = {
    "an error": (
        lambda: config(recompute_granularity="full"),
        r"recompute_method .*\(megatron/core/.*py:\d+\)$",
    ),
    "an assertion": (
        lambda: config(no_rope_freq=[1, 1, 1]),
        r"no_rope list \(3\) must match .*\(megatron/core/",
    ),
    "one without words": (
        lambda: schedule(lr_warmup_steps=100),
        r"it needs `self.lr_warmup_steps < self.lr_decay_steps`, and says no more "
        r"\(megatron/core/optimizer_param_scheduler.py:",
    ),
    "a package": (
        lambda: importlib.import_module("absent.part"),
        "the Python package absent is not installed",
    ),
    "a file": (Path("/absent/file").read_text, "No such file or directory: '/absent/file'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    function, pattern = REFUSALS[name]
    error = caught(function)
    assert re.search(pattern, why_refused(error))
    assert "\n" not in why_refused(error)
    with pytest.raises(UsageError, match=r"^Megatron refuses these flags: "), refusals_in_one_line():
        function()


def mistaken_module():
    """Raise from a module of the package that asks for what is not there."""
    importlib.import_module("megatron_periln.norms.absent")


def mistaken_placement():
    place_norms(None, None, config())


def mistaken_condition():
    """Fail in the condition of one of Megatron's assertions: ``assert self.min_lr >= 0.0``."""
    OptimizerParamScheduler(
        None, 0.0, 1e-3, None, 2, 10, "constant", 0.1, 0.1, 10, "constant", override_opt_param_scheduler=False
    )


def lost_connection():
    def lose():
        raise torch.distributed.DistBackendError("NCCL")

    schedule(lr_decay_steps=Compared(lose))


class Compared:
    """Call a function inside Megatron, when it compares."""

    def __init__(self, function):
        self.function = function

    def __gt__(self, other):
        self.function()


FAILURES = {
    "no list": (
        lambda: config(recompute_granularity="selective", recompute_modules=7),
        r"^Megatron fails with these flags: TypeError: .*\(megatron/core/transformer/transformer_config.py:",
    ),
    "a condition": (
        mistaken_condition,
        r"^Megatron fails with these flags: TypeError: .* \(megatron/core/optimizer_param_scheduler.py:\d+\)",
    ),
    "no counterpart on the CPU": (
        lambda: schedule(lr_decay_steps=Compared(lambda: cuda_surface._unmapped())),
        r"RuntimeError: a CUDA function without .*\(megatron/core/optimizer_param_scheduler.py:\d+\)",
    ),
    "inside torch": (
        lambda: schedule(lr_decay_steps=torch.ones(2)),
        r"^Megatron fails with these flags: RuntimeError: .*\(megatron/core/optimizer_param_scheduler.py:",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_of_megatron_are_told_as_what_they_are(name):
    function, pattern = FAILURES[name]
    error = caught(function)
    assert why_refused(error) is None
    assert re.search(pattern, one_line(error))
    with pytest.raises(UsageError, match=pattern), refusals_in_one_line():
        function()


FAULTS = {
    "shapes": lambda: torch.ones(2) @ torch.ones(3),
    "a value": lambda: int("x"),
    "a module of ours": mistaken_module,
    "a function of ours": mistaken_placement,
    "a lost connection": lost_connection,
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    error = caught(FAULTS[name])
    assert one_line(error) is None
    with pytest.raises(type(error)), refusals_in_one_line():
        FAULTS[name]()


def test_nothing_is_a_refusal_once_training_has_begun():
    source = "def train(function):\n    return function()\n"
    space = {}
    exec(compile(source, megatron.__path__[0] + "/training/training.py", "exec"), space)
    error = caught(space["train"], lambda: config(recompute_granularity="full"))
    assert one_line(error) is None
    assert one_line(caught(lambda: config(recompute_granularity="full"))) is not None


@pytest.fixture
def ranks(monkeypatch):
    """Meet an error on some of three ranks, and return those that speak in rank 0's place."""
    monkeypatch.setattr(rendezvous, "_SECONDS_BETWEEN_TRIES", 0.01)

    def meet(numbers):
        monkeypatch.setattr(rendezvous, "_store", torch.distributed.HashStore())
        speakers = []

        def fail(rank):
            try:
                with refusals_in_one_line(argparse.Namespace(rank=rank, world_size=3)):
                    config(recompute_granularity="full")
            except UsageError as error:
                speakers.extend([rank] if isinstance(error, RankError) or rank == 0 else [])

        threads = [threading.Thread(target=fail, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return speakers

    return meet


@pytest.mark.parametrize("numbers", [[0, 1, 2], [2, 1, 0], [0]])
def test_the_first_rank_speaks_if_it_knows(ranks, numbers):
    assert ranks(numbers) == [0]


@pytest.mark.parametrize("numbers", [[1], [2], [1, 2], [2, 1]])
def test_the_lowest_other_rank_speaks_if_it_does_not(ranks, numbers):
    assert ranks(numbers) == [min(numbers)]
