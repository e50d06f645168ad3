"""What a process starts ends with it, also if it is killed; what fails ends in time."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_periln.endings import children


def run(source):
    """Run a program, and return what came of it."""
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)


def gone(pid, seconds=20):
    """Tell whether a process has ended, or ends before long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("keeps", [True, False])
def test_a_fork_of_a_killed_process_ends(keeps):
    """The negative control: without it, it goes on."""
    source = """
import multiprocessing, os, signal, sys, time
from megatron_periln.endings.children import keep_no_orphans
if sys.argv[1] == "True":
    keep_no_orphans()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
child.start()
print(child.pid, flush=True)
os.close(1), os.close(2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen(
        [sys.executable, "-c", source, str(keeps)], stdout=subprocess.PIPE, text=True
    ) as process:
        child = int(process.stdout.readline())
        process.wait()
    try:
        assert gone(child, 20 if keeps else 0.5) is keeps
    finally:
        if not keeps:
            os.kill(child, signal.SIGKILL)


def test_a_spawned_process_ends_too_and_leaves_sigterm_to_the_rank(tmp_path):
    """It imports the program that the rank runs, as ``__mp_main__``."""
    source = """
import importlib.util, multiprocessing, os, signal, sys, time
main = sys.modules["__main__"]
main.__spec__ = importlib.util.find_spec("megatron_periln.pretrain")
sys.argv.append("--exit-signal-handler")
child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(3600,))
child.start()
print(child.pid, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", source], text=True, **pipes) as process:
        child = psutil.Process(int(process.stdout.readline()))
        deadline = time.monotonic() + 30
        while not ignores(child.pid, signal.SIGTERM) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ignores(child.pid, signal.SIGTERM)
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait()
    assert gone(child.pid)


def ignores(pid, signal_):
    (signals,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(signals, 16) >> (signal_ - 1) & 1)


def heed(ready):
    signal.signal(signal.SIGTERM, lambda *_: None)
    ready.set()
    time.sleep(3600)


def test_children_that_heed_sigterm_are_ended(monkeypatch):
    monkeypatch.setattr(children, "_ending", False)
    monkeypatch.setattr("torch.utils.data._utils.python_exit_status", False)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=heed, args=(ready,), daemon=True)
    child.start()
    assert ready.wait(20)
    handler = signal.getsignal(signal.SIGCHLD)
    assert not children.are_ending()
    children.end_children()
    signal.signal(signal.SIGCHLD, handler)
    assert children.are_ending()
    assert child.exitcode == -signal.SIGKILL


HANGS = """
import atexit, sys, time
from megatron_periln.endings import in_time
in_time._SECONDS = 0.2
atexit.register(time.sleep, 3600)
with in_time.ends_in_time():
    {}
"""


def test_what_hangs_after_an_error_ends():
    done = run(HANGS.format("1 / 0"))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "Timeout" in done.stderr  # faulthandler's, which shows where it stood


def test_what_has_ended_well_may_take_its_time():
    done = run(HANGS.format("atexit.unregister(time.sleep); atexit.register(time.sleep, 0.5); sys.exit(0)"))
    assert (done.returncode, done.stderr) == (0, "")
