"""Whether the run that the flags describe fits its GPUs, by its plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator

from megatron_periln.doctor.options import of_pretraining
from megatron_periln.doctor.rows import Row
from megatron_periln.doctor.timeouts import run_within

__all__ = ["check_plan"]

_CHECK = "plan"


def check_plan(options: Namespace) -> Iterator[Row]:
    """Plan the run in a process of its own, in which the CPU stands in for the GPU."""
    ranks = options.world_size or os.environ.get("WORLD_SIZE")
    if ranks is None:
        yield Row(_CHECK, "failed", "the number of GPUs is not known", "give --world-size N beside --plan")
        return
    own = ["--world-size", str(ranks), "--gpu", options.plan, "--json"]
    command = [sys.executable, "-W", "ignore", "-m", "megatron_periln.plan", *own, *of_pretraining(options)]
    try:
        done = run_within(command, options.timeout)
    except subprocess.TimeoutExpired:
        yield Row(_CHECK, "failed", f"no end in {options.timeout:g} s", "give a longer --timeout")
        return
    error, _, advice = _cause(done.stderr).partition("; ")
    if done.returncode == 0:
        yield Row(_CHECK, "ok", _needs(done.stdout))
    else:
        yield Row(_CHECK, "failed", error or f"exit status {done.returncode}", advice)


def _cause(stderr: str) -> str:
    lines = [line.removeprefix("error: ") for line in stderr.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _needs(text: str) -> str:
    planned = json.loads(text)
    fullest = max(planned["ranks"], key=lambda rank: rank["bytes"])
    gpu = planned["gpu"]
    return (
        f"{fullest['name']} needs {fullest['bytes'] / 2**30:.1f} GiB of {gpu['name']}'s "
        f"{gpu['memory'] / 2**30:.1f} GiB"
    )
