"""The kernels as compiled for Hopper: nothing spills, nothing is atomic, loads are wide and go together."""

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
    assert len(rows) == 2 * (11 * len(HIDDEN_SIZES) + 4 * len(with_next))
    assert [row for row in rows if row["spills"] or row["atomics"]] == []
    assert process.returncode == 0, process.stderr


def test_loads_are_16_bytes_wide(results):
    assert {row["widest_load_bits"] for row in results[1]} == {128}


@pytest.mark.parametrize("variant", ["RMSNorm", "RMSNorm, fp32 stream", "RMSNorm, and the next"])
def test_all_of_a_row_is_asked_for_before_any_of_it_is_waited_for(results, variant):
    rows = [row for row in results[1] if row["kernel"] == "norm_add_backward" and row["variant"] == variant]
    assert rows and {row["memory_waits"] for row in rows} == {1}


LOOP = """\
--:-:0:-:1	LDG.E R0, desc[UR0][R2.64];
01:-:-:-:1	FADD R0, R0, R0;
LBB0:
--:-:2:-:1	LDG.E.128 R4, desc[UR6][R2.64];
02:-:-:-:1	IADD3 R3, R3, R3, RZ;
--:-:3:-:1	LDG.E.128 R8, desc[UR6][R2.64];
{between}
--:0:3:-:1	LDG.E R12, desc[UR6][R2.64];
08:-:-:-:6	@!P0 BRA LBB0;
--:-:-:-:5	EXIT;
LBB1:
--:-:-:Y:0	BRA LBB1;
"""


@pytest.mark.parametrize(
    ("between", "waits"),
    [
        ("", 1),
        ("02:-:-:-:1	FADD R1, R1, R1;", 1),
        ("04:-:-:-:1	FADD R4, R4, R4;", 2),
        ("12:0:-:-:1	BAR;", 2),
    ],
)
def test_a_load_behind_what_waits_for_another_would_show(monkeypatch, between, waits):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import kernel_resources  # from the folder that was prepended

    assert kernel_resources.count_memory_waits(LOOP.format(between=between)) == waits
    assert kernel_resources.count_memory_waits("--:-:0:-:1	LDG.E R0;\nLBB0:\n--:-:-:Y:0	BRA LBB0;") == 0


def test_the_backward_grid_of_plain_rmsnorm_is_resident(results):
    rows = [row for row in results[1] if row["kernel"] == "norm_add_backward" and row["variant"] == "RMSNorm"]
    assert {row["hidden_size"] for row in rows} == {2560, 8192}
    for row in rows:
        if row["warps"] <= 8:  # longer rows take turns
            assert row["programs_on_sm"] >= choose_launch_config(row["hidden_size"]).programs_per_sm, row
