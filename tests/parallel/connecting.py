"""The fork server of a run of tests: all processes that share a folder share one."""

import atexit
import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Nothing is fetched; huggingface_hub asks when it is imported.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def connect(folder):
    """Return a connection to the fork server of ``folder``, for jobs in this process's environment.

    It is started where none runs, also where the process has ended that had started it.
    """
    connection = socket.socket(socket.AF_UNIX)
    with (folder / "forkserver").open("a+") as name:
        fcntl.flock(name, fcntl.LOCK_EX)
        name.seek(0)
        try:
            connection.connect(f"\0{name.read()}")
        except ConnectionRefusedError:
            started = _start()
            name.truncate(0)
            name.write(started)
            connection.connect(f"\0{started}")
    stream = connection.makefile("rw")
    connection.close()  # once the stream is closed, too
    print(json.dumps(_environment()), file=stream, flush=True)
    return stream


def _environment():
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *paths]), "OMP_NUM_THREADS": "1"}


def _start():
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.parallel.forkserver"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=_environment() | OFFLINE,
    )
    atexit.register(_end, server)
    name = server.stdout.readline().strip()
    assert name, "the fork server has not started"
    return name


def _end(server):
    """End a server; where this process is killed, the end of its standard input does."""
    with contextlib.suppress(BrokenPipeError):
        print("end", file=server.stdin, flush=True)
    server.wait()
