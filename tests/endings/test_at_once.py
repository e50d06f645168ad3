"""A process that ends at once has done all that others see of an end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKS = """
import atexit, ctypes, sys, threading, time
from megatron_periln.endings.at_once import end_at_once

class Kept:
    def __del__(self):
        print("taken apart", end="")

kept = Kept()
atexit.register(print, "registered", end=" ")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread", end=" "))).start()
libc = ctypes.CDLL(None)
libc.printf(b"in C ")
print("first", end=" ")
{}
end_at_once()
print("as ever", end=" ")
"""


def run(program, *options, **kwargs):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, *options, "-c", program], text=True, env=buffered, **kwargs)


def test_all_is_done_but_what_no_one_sees():
    done = run(WORKS.format(""), capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.replace("in C ", "") == "first thread registered "
    assert "in C " in done.stdout  # in the order of C's buffer and Python's


@pytest.mark.parametrize(
    ("watch", "options"),
    [
        ("sys.setprofile(lambda *_: None)", ()),
        ("sys.settrace(lambda *_: None)", ()),
        ("import cProfile; cProfile.Profile().enable()", ()),
        ("", ("-i",)),
    ],
    ids=["setprofile", "settrace", "cProfile", "a prompt"],
)
def test_who_is_watched_ends_as_ever(watch, options):
    done = run(WORKS.format(watch), *options, capture_output=True, stdin=subprocess.DEVNULL)
    assert "as ever" in done.stdout


def test_lines_that_cannot_be_written_are_told_as_ever():
    program = "print('lost'){}"
    both = []
    for end in "", "; from megatron_periln.endings.at_once import end_at_once; end_at_once()":
        with Path("/dev/full").open("w") as full:
            done = run(program.format(end), stdout=full, stderr=subprocess.PIPE)
        both.append((done.returncode, done.stderr))
    assert both[0] == both[1]
    assert both[0][0] == 120
