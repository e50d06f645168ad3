import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import DEVICE


@pytest.fixture(autouse=True)
def interpreted_bf16(monkeypatch, request):
    """Where Triton's kernels are interpreted, let them have a GPU's bf16, or fail; and sum long rows soon."""
    if DEVICE == "cpu":
        from tests.norms import interpreter  # imports Triton, which a GPU's tests import when they need it

        interpreter.repeat_less()
        interpreter.compute_as_a_gpu_does(monkeypatch)
        given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        if getattr(given.get("case"), "hidden", 0) > 1000:
            interpreter.sum_in_wide_tiles(monkeypatch)


@pytest.fixture(scope="session")
def compiled_on_the_cpu():
    """Return what compiled_on_the_cpu.py found."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("compiled_on_the_cpu.py")]
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
