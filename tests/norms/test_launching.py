"""Kernels are launched again as Triton would launch them, and by Triton where that isn't known."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="Triton's launcher is compiled")


@pytest.fixture(scope="module")
def results():
    """Return what launches_on_nothing.py found."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    command = [sys.executable, ROOT / "tests/norms/launches_on_nothing.py"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_a_relaunch_is_the_launch_that_triton_would_make(results):
    launches = results["same launches"]
    assert len(launches) == 17
    for name, (found, is_same, count, parameters) in launches.items():
        assert found, name
        assert is_same, name  # grid, threads, shared memory, stream, kernel, and each parameter
        assert count == 1, name
        width_is_compiled_in = name == "learned, sum_of_scales"
        assert len(set(parameters)) > 2 - width_is_compiled_in, name  # what is compared was read


LIKE_THE_FIRST = [0, 1]  # calls of Triton, launches


@pytest.mark.parametrize("when", ["like the first", "like the first again"])
def test_a_call_like_the_first_doesn_t_ask_triton(results, when):
    assert results["calls of Triton"][when] == LIKE_THE_FIRST


def test_the_stream_is_the_current_one(results):
    assert results["calls of Triton"]["on another stream"] == [*LIKE_THE_FIRST, 9]


@pytest.mark.parametrize("circumstance", ["on another device", "unaligned", "with other strides"])
def test_triton_launches_what_differs(results, circumstance):
    assert results["calls of Triton"][circumstance] == [1, 1]


def test_a_profiler_is_told_of_every_launch(results):
    assert results["calls of Triton"]["watched by a profiler"] == [1, 1, 1]


def test_each_pass_launches_what_it_did_when_triton_launched(results):
    assert results["through autograd"] == [[1, 2]] * 3


def test_a_triton_that_launches_otherwise_goes_on_launching(results):
    assert results["another Triton"] == {"as it is": [False, 2], "launches twice": [True, 4]}
