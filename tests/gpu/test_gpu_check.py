"""``benchmarks/gpu_check.py``: results come one by one, and are packed whatever fails or is stopped."""

import importlib.metadata
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = [pytest.mark.gpu, pytest.mark.rehearsed]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = """
import sys
sys.path.insert(0, {benchmarks!r})
import gpu_check
from gpu_check import Check

def python(name, code, **options):
    return Check(name, (sys.executable, "-c", code), **{{"limit": 30, **options}})

HANGS = "import subprocess, sys, time; sleep = [sys.executable, '-c', 'import time; time.sleep(60)'];"
HANGS += "print(subprocess.Popen(sleep).pid, flush=True); time.sleep(60)"
gpu_check.LEAST_SECONDS = 0.0
gpu_check.checks_on_cpu = lambda half: {checks}
gpu_check.main()
"""


def start(folder, checks, *flags, half=("--half", "tests")):
    """Start a rehearsal of other checks."""
    source = SCRIPT.format(benchmarks=str(BENCHMARKS), checks=checks)
    command = [sys.executable, "-c", source, "--rehearse", *half, "--output", folder, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def packed(folder, archive="gpu-check-tests.tar.gz"):
    with tarfile.open(folder / archive) as tar:
        return set(tar.getnames()), json.load(tar.extractfile("summary.json"))


def is_running(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_whatever_fails_or_hangs_the_rest_runs_and_all_is_packed(tmp_path):
    checks = """[
        python("well", "print(1)"), python("bad", "raise SystemExit(3)"), python("hangs", HANGS, limit=2),
        Check("gone", ("/no/such/program",), 5), python("large", "", memory=70),
        python("writes", "open('own.json', 'w').write('{}')"),
    ]"""
    out, err = (process := start(tmp_path, checks)).communicate(timeout=60)
    assert process.returncode == 1 and "(bad, hangs, gone)" in err
    names, summary = packed(tmp_path)
    outcomes = {result["check"]: result["outcome"] for result in summary}
    assert outcomes["well"] == outcomes["writes"] == "passed"
    assert outcomes["bad"] == "failed with status 3"
    assert outcomes["hangs"] == "stopped after 2 s"
    assert outcomes["gone"].startswith("failed to start: ")
    assert outcomes["large"] == "skipped: needs 70 GB"
    assert names >= {"results.txt", "summary.json", "own.json", "well.log", "hangs.log"}
    assert len(out.splitlines()) == 7 and out.splitlines()[-1].endswith("gpu-check-tests.tar.gz")
    assert not is_running(int((tmp_path / "hangs.log").read_text()))  # what it had started, too


def test_what_measures_no_time_runs_beside_the_next(tmp_path):
    wait = "import pathlib, time\nwhile not pathlib.Path('{}').exists(): time.sleep(0.01)"
    checks = f"""[
        python("first", {wait.format("second")!r}, beside=True),
        python("second", "open('second', 'w')"), python("third", ""),
    ]"""
    process = start(tmp_path, checks)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert {result["outcome"] for result in packed(tmp_path)[1]} == {"passed"}


def test_the_time_is_kept(tmp_path):
    checks = '[python("long", HANGS), python("next", "")]'
    process = start(tmp_path, checks, "--seconds", "2")
    process.communicate(timeout=60)
    outcomes = [result["outcome"] for result in packed(tmp_path)[1]]
    assert outcomes[0].startswith("stopped after") and outcomes[1] == "skipped: no time left"


def test_what_there_is_is_packed_as_it_is_stopped(tmp_path):
    process = start(tmp_path, '[python("well", ""), python("hangs", HANGS), python("next", "")]')
    log = tmp_path / "hangs.log"
    while not (log.exists() and log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1
    names, summary = packed(tmp_path)
    assert [result["outcome"] for result in summary][-1] == "stopped by SIGTERM"
    assert "well.log" in names and not is_running(int(log.read_text()))


def test_both_halves_follow_one_another_and_tests_leave_time_for_benchmarks(tmp_path):
    checks = """{
        "tests": [python("tests", HANGS)],
        "benchmarks": [python("before", "print(open('gpu-check.tar.gz').name)"), python("long", HANGS)],
    }[half]"""
    process = start(tmp_path, checks, "--seconds", "6", half=())
    process.communicate(timeout=60)
    names, summary = packed(tmp_path, "gpu-check.tar.gz")
    outcomes = {result["check"]: result["outcome"] for result in summary}
    assert list(outcomes) == ["tests", "before", "long"]
    assert outcomes["tests"] == "stopped after 3 s" and outcomes["long"].startswith("stopped after")
    assert outcomes["before"] == "passed"  # what the tests left was packed
    assert {"tests.log", "before.log", "long.log"} <= names
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []


@pytest.mark.parametrize("half", ["tests", "benchmarks"])
def test_both_halves_name_what_is_there(monkeypatch, half):
    """On the GPU and in rehearsal: scripts, tests, and every file of tests/gpu."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_check  # from the folder that was prepended

    for checks in (gpu_check.checks_on_gpu(half), gpu_check.checks_on_cpu(half)):
        names = [check.name for check in checks]
        assert len(set(names)) == len(names)
        paths = [word for check in checks for word in check.command if word.endswith(".py")]
        assert [path for path in paths if not Path(path).exists()] == []
    if half == "tests":
        here = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {"test_gpu_check.py"}
        assert {Path(path).name for path in paths} == here
        assert "test_pretraining.py" in paths[0]


def test_wheels_come_with_what_they_need():
    """Or Megatron's import ends on a bare machine, as that of emerging-optimizers did without absl-py."""
    lines = (BENCHMARKS / "gpu_wheels.txt").read_text().splitlines()
    wheels = {canonicalize_name(line) for line in lines if not line.startswith("#")}
    there = {"torch", "triton", "numpy"}
    while more := {need for package in there for need in needs(package)} - there:
        there |= more
    missing = {wheel: needs(wheel) - wheels - there for wheel in wheels}
    # Of gigatoken its module of Rust is called alone.
    assert {wheel for wheel, names in missing.items() if names} <= {"gigatoken"}
    assert "absl-py" in needs("emerging-optimizers")


def needs(package):
    """Return what a package requires here, as far as it is installed."""
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires(package) or ()]
    except importlib.metadata.PackageNotFoundError:
        return set()
    return {
        canonicalize_name(each.name)
        for each in requirements
        if each.marker is None or each.marker.evaluate({"extra": ""})
    }
