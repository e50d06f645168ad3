"""The kernels as compiled for Hopper, without one: nothing spills, nothing is atomic, loads are wide."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_periln.norms.kernels.launch_config import MAX_NORM_ADD_NORM_HIDDEN_SIZE, choose_launch_config

ROOT = Path(__file__).parents[2]
HIDDEN_SIZES = (2560, 8192, 16384)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return one dict a kernel, variant and hidden size."""
    output = tmp_path_factory.mktemp("resources") / "resources.json"
    command = [sys.executable, ROOT / "benchmarks" / "kernel_resources.py", "--output", output]
    command += ["--hidden-sizes", *map(str, HIDDEN_SIZES)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(output.parent / "cache")}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert output.exists(), process.stderr
    return process, json.loads(output.read_text())["results"]


def test_no_shipped_configuration_spills_or_uses_atomics(results):
    process, rows = results
    with_next = [size for size in HIDDEN_SIZES if size <= MAX_NORM_ADD_NORM_HIDDEN_SIZE]
    assert len(rows) == 2 * (7 * len(HIDDEN_SIZES) + 4 * len(with_next))
    assert [row for row in rows if row["spills"] or row["atomics"]] == []
    assert process.returncode == 0, process.stderr


def test_loads_are_16_bytes_wide(results):
    assert {row["widest_load_bits"] for row in results[1]} == {128}


def test_the_backward_grid_of_plain_rmsnorm_is_resident(results):
    rows = [row for row in results[1] if row["kernel"] == "norm_add_backward" and row["variant"] == "RMSNorm"]
    assert {row["hidden_size"] for row in rows} == {2560, 8192}
    for row in rows:
        if row["warps"] <= 8:  # longer rows take turns
            assert row["programs_on_sm"] >= choose_launch_config(row["hidden_size"]).programs_per_sm, row
