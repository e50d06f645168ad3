"""What only several ranks show: two of them, over gloo."""

from __future__ import annotations

import json

import pytest

from megatron_periln.doctor.communication import ThisRank, find_rank
from tests.cpu.fresh import call
from tests.doctor import two_ranks


@pytest.fixture
def together(tmp_path, data):
    """Run two ranks; return the exit codes, ``{check: [(node, status, value)]}`` and rank 0's stderr."""

    def run(*flags, by_srun=False, **faults):
        faults = {int(rank.removeprefix("rank")): fault for rank, fault in faults.items()}
        common = ["--device", "cpu", "--json", "--save", str(tmp_path / "save"), "--data-path", str(data)]
        codes, written = call(two_ranks.run, str(tmp_path), [*common, *flags], faults, by_srun)
        (out, err), silent = written
        assert silent == ["", ""] or 0 in faults or "absence" in faults.values()
        rows = {}
        for row in json.loads(out)["rows"] if out else []:
            rows.setdefault(row["check"], []).append((row["node"], row["status"], row["value"]))
        return codes, rows, err

    return run


@pytest.mark.parametrize("by_srun", [False, True])
def test_healthy(together, by_srun):
    codes, rows, _ = together(*["--all-reduce"] * by_srun, by_srun=by_srun)
    assert codes == [0, 0]
    assert rows["rendezvous"] == [("node0", "ok", "2 ranks")]
    assert [(node, status) for node, status, _ in rows["datasets"]] == [("node0", "ok"), ("node1", "ok")]
    ((_, status, value),) = rows["all-reduce"]
    speed, rest = value.split(" GB/s ")
    assert (status, rest) == ("ok", "bus bandwidth, 2 ranks, 1 MiB, gloo") and float(speed) > 0
    ((_, status, value),) = rows["clocks, ranks"]
    assert status == "ok" and float(value.split()[0]) < 0.5


def test_a_clock_is_ahead(together):
    codes, rows, err = together(rank1="a_clock_ahead")
    assert codes == [1, 1]
    ((_, status, value),) = rows["clocks, ranks"]
    assert status == "failed" and float(value.split()[0]) == pytest.approx(60, abs=5)
    assert "s apart: node1 is ahead of node0; synchronize" in err


def test_a_wrong_sum(together):
    codes, rows, _ = together(rank1="a_wrong_sum")
    assert codes == [1, 1]
    assert ("node1", "failed", "rank 1 got a wrong sum") in rows["all-reduce"]


def test_too_slow(together):
    codes, rows, err = together("--minimum-bandwidth", "1e6")
    assert codes == [1, 1]
    assert rows["all-reduce"][0][1] == "failed"
    assert "below 1e+06 GB/s; see NCCL_DEBUG" in err


def test_a_rank_that_never_comes(together):
    """The other tells what it found on its own node."""
    codes, rows, err = together("--timeout", "1", rank1="absence")
    assert codes == [1, 0]
    assert rows["rendezvous"][0][:2] == ("node0", "failed")
    assert rows["datasets"][0][:2] == ("node0", "ok")
    assert "error: node0: rendezvous: " in err


def test_the_rank_of_the_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert find_rank(False) == ThisRank(0, 1, 0)
    for name, value in {"SLURM_PROCID": 3, "SLURM_NTASKS": 4, "SLURM_LOCALID": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert find_rank(False) == ThisRank(0, 1, 0)  # one process on each node, which checks that node alone
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert find_rank(False) == find_rank(True) == ThisRank(5, 8, 2)
