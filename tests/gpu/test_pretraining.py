"""Pretraining by the command line on one GPU, in configurations side by side, next to the CPU's losses.

Each prints a line, and adds it to the file that ``MEGATRON_PERILN_PRETRAINING_TABLE`` names as it ends. With
``MEGATRON_PERILN_REHEARSE=1``, as in a rehearsal of gpu-check, the CPU takes the GPU's place in some.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from megatron_periln.plan.model import arguments
from tests.gpu import pretraining
from tests.gpu.conftest import HAVE_GPU
from tests.gpu.pretraining import CASES, LOSSES, Case, Outcome

pytestmark = [pytest.mark.gpu, pytest.mark.rehearsed]

SECONDS = float(os.environ.get("MEGATRON_PERILN_PRETRAINING_SECONDS", "150"))
REHEARSE = os.environ.get("MEGATRON_PERILN_REHEARSE") == "1"
ON_ANY_CPU = ("peri",)
REHEARSED = ("peri", "fp32 residual", "moe", "asynchronous saves, resumed", "distributed optimizer, overlap")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_losses_are_those_of_the_cpu(case, tmp_path):
    if not HAVE_GPU and case.name not in (REHEARSED if REHEARSE else ON_ANY_CPU):
        pytest.skip("needs a GPU")
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"needs {case.needs}")
    outcome = pretraining.run(case, tmp_path, "cuda" if HAVE_GPU else "cpu", SECONDS)
    told = pretraining.line(case, outcome)
    print(told)
    if table := os.environ.get("MEGATRON_PERILN_PRETRAINING_TABLE"):
        with Path(table).open("a") as stream:
            stream.write(f"{told}\n")
    assert pretraining.verdict(case, outcome) == "", (tmp_path / "log").read_text()[-4000:]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_flags_are_those_of_a_run_on_a_gpu(case, tmp_path, monkeypatch):
    """Or it would show there only: Megatron, and our own rules, validate them as on a GPU."""
    monkeypatch.setattr(arguments, "UNPLANNED", ())
    args = arguments.run_arguments(pretraining.flags_of(case, tmp_path, "cuda"), 1)
    assert args.train_iters == 8 and args.seq_length == 128
    if "graphs" in case.name:
        assert args.cuda_graph_impl == ("local" if "local" in case.name else "transformer_engine")


def test_the_kept_losses_are_of_these_flags():
    kept = {name: entry["flags"] for name, entry in json.loads(LOSSES.read_text()).items()}
    assert kept == {case.name: " ".join(case.flags.split()) for case in pretraining.on_the_cpu()}
    assert {case.like for case in CASES} - {None, ""} <= kept.keys()


def test_the_kept_losses_fall_and_tell_configurations_apart():
    """Or a wrong model would pass for the right one."""
    curves = {case.name: pretraining.expected_losses(case) for case in pretraining.on_the_cpu()}
    for losses in curves.values():
        assert losses[8] < 0.95 * losses[1]
    assert max(abs(curves["pre"][i] / curves["peri"][i] - 1) for i in range(1, 9)) > 5 * pretraining.BF16


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, ""),
        ({8: 1.02}, "off the CPU's losses"),
        ({1: 0.99}, "off the CPU's losses"),
        ({8: float("nan")}, "off the CPU's losses"),
        ({8: None}, "iterations [1, 2, 3, 4, 5, 6, 7]"),
    ],
)
def test_a_verdict(change, wrong):
    case = CASES[0]
    losses = {
        iteration: loss * (change.get(iteration, 1) or 1)
        for iteration, loss in pretraining.expected_losses(case).items()
        if change.get(iteration, 1) is not None
    }
    found = pretraining.verdict(case, Outcome(losses, 1.0))
    assert wrong in found and bool(wrong) == bool(found)
    assert pretraining.verdict(case, Outcome({}, 1.0, "error: of CUDA")) == "error: of CUDA"
    assert pretraining.line(case, Outcome(losses, 1.0)).startswith("peri ")


def test_a_resumed_run_is_to_print_the_mean_of_its_first_two_losses():
    (case,) = [case for case in CASES if case.resumed]
    straight, expected = (pretraining.expected_losses(each) for each in (CASES[0], case))
    assert expected.pop(6) == (straight[5] + straight.pop(6)) / 2
    assert expected == straight


def test_a_case_without_a_counterpart_is_to_fall():
    case = Case("new", "", like="")
    falls = {i: 5.0 - i / 4 for i in range(1, 9)}
    assert pretraining.verdict(case, Outcome(falls, 1.0)) == ""
    assert "does not fall" in pretraining.verdict(case, Outcome(dict.fromkeys(falls, 5.0), 1.0))
