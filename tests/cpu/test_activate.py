"""Activating the CPU: when it is refused, what it changes, what it leaves alone.

All happens in one process that starts without it: refused activations change nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_periln import cpu

ROOT = Path(__file__).parents[2]
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"

SCRIPT = """
import json, os, sys, types
import torch
from megatron_periln import cpu
from megatron_periln.cpu.cuda_surface import surface

def refusal():
    try:
        cpu.activate()
    except RuntimeError as error:
        return str(error)

found = {"unknown names": [name for name in surface() if not hasattr(torch.cuda, name)]}
factory, available = torch.empty, torch.cuda.is_available
torch.cuda.is_available = lambda: True
found["with a GPU"] = refusal()
torch.cuda.is_available = available
sys.modules["megatron"] = types.ModuleType("megatron")
found["after megatron"] = refusal()
del sys.modules["megatron"]
found["untouched after refusal"] = torch.empty is factory and not cpu.is_active()

torch.cuda.is_available = lambda: True
cpu.activate(hide_gpu=True)
found["hidden GPU"] = str(torch.empty(2, device="cuda").device)
found["connections"] = os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
found["modules"] = sorted(name for name in sys.modules if name.startswith("megatron_periln"))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    """What a fresh process found on its way to an active CPU."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env={name: value for name, value in os.environ.items() if name != CONNECTIONS}
        | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_it_is_refused_where_there_is_a_gpu(found):
    assert "this machine has a GPU" in found["with a GPU"]
    assert "CUDA_VISIBLE_DEVICES=" in found["with a GPU"]


def test_it_is_refused_once_megatron_is_imported(found):
    assert "only before megatron is imported" in found["after megatron"]


def test_refusal_changes_nothing(found):
    assert found["untouched after refusal"]


def test_a_gpu_can_be_hidden(found):
    assert found["hidden GPU"] == "cpu"


def test_kernel_order_is_set_as_megatron_asks(found):
    assert found["connections"] == "1"


def test_it_knows_nothing_of_the_rest_of_the_package(found):
    others = [
        name
        for name in found["modules"]
        if not name.startswith(("megatron_periln.cpu", "megatron_periln.patches"))
    ]
    assert others == ["megatron_periln", "megatron_periln.version"]


def test_torch_has_every_mapped_name(found):
    assert found["unknown names"] == []


def test_again_it_changes_nothing():
    before = torch.empty, torch.Tensor.to, torch.cuda.current_stream, torch.compile
    assert cpu.is_active()
    cpu.activate()
    assert (torch.empty, torch.Tensor.to, torch.cuda.current_stream, torch.compile) == before
