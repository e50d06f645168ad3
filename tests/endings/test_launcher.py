"""A rank ends with the torchrun that has started it, and with nothing else."""

import ctypes
import os
import subprocess
import sys

import pytest

RANK = """
import os, sys, time
from megatron_periln.endings.launcher import end_with_launcher
read, write = os.pipe()
rank = os.fork()
if rank:
    os.write(1, f"{rank}\\n".encode())
    os.read(read, 1)
    os._exit(0)
end_with_launcher()
os.write(write, b"x")
time.sleep(float(sys.argv[1]))
os._exit(7)
"""


@pytest.mark.parametrize(
    ("environment", "seconds", "status"),
    [({"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "0"}, 3600, 1), ({}, 0.3, 7)],
    ids=["torchrun", "a shell"],
)
def test_a_rank_whose_parent_has_ended(environment, seconds, status):
    """This process takes in the orphan, and so sees its status."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        said, error = process.communicate(timeout=30)
        assert process.returncode == 0
        assert os.waitstatus_to_exitcode(os.waitpid(int(said), 0)[1]) == status
    finally:
        ctypes.CDLL(None).prctl(36, 0)
    assert (f"error: torchrun (process {process.pid}) is gone" in error) == (status == 1)
