"""What is installed, and whether it can be imported."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron_periln.doctor.probe import OF_TRANSFORMER_ENGINE, ON_A_GPU
from megatron_periln.doctor.rows import Row
from megatron_periln.doctor.timeouts import run_within
from megatron_periln.package_versions import find_version_mismatch

__all__ = ["Answers", "check_python", "check_requirements", "checkpoint_bytes", "package_rows", "probe"]

Answers = dict[str, dict[str, Any]]
"""What `probe` answered for each of its steps: ``version`` and more, or ``error`` and ``missing``."""

_ADVICE = {
    "torch": "install torch, or use NVIDIA's PyTorch image",
    "CUDA": "run on a node with a GPU and its driver (docker run --gpus all), or give --device cpu",
    "NCCL": "use a torch built with NCCL",
    "GPUs": "drain the node, and run nvidia-smi",
    "Transformer Engine": "install it, or give --transformer-impl local and the flags beside it in README.md",
    "cuDNN": "use a torch with cuDNN",
    "attention, norm, linear": "install versions that fit (docs/install.md), or --transformer-impl local",
    "Apex": "fix or remove it",
    "CPU": "see the other rows",
    "megatron-core": "pip install -e .",
}
_OPTIONAL = {"Transformer Engine": "warning", "Apex": "ok"}
"""What may be missing, and how much that matters: torch has counterparts of what is used of Apex."""


def probe(options: Namespace) -> Answers:
    """Import the packages in a process of their own, and return what came of each."""
    command = [sys.executable, "-W", "ignore", "-m", "megatron_periln.doctor.probe", options.device]
    stderr = ""
    try:
        done = run_within([*command, *options.flags], options.timeout)
        stdout, stderr, end = done.stdout, done.stderr, _how_it_ended(done.returncode)
    except subprocess.TimeoutExpired as expired:
        stdout = expired.stdout.decode(errors="replace") if expired.stdout else ""
        end = f"no end in {options.timeout:g} s"
    answers: Answers = {}
    started = None
    for line in filter(None, map(str.strip, stdout.splitlines())):
        answer = json.loads(line)
        started = answer.get("starts")
        if started is None:
            answers[answer.pop("name")] = answer
    if started is not None or not answers:
        last = stderr.strip().splitlines()[-1:] or [""]
        what = "it" if started in OF_TRANSFORMER_ENGINE else "its import"
        answers[started or "torch"] = {
            "error": f"{what} came to {end} {last[0]}".strip(),
            "missing": False,
        }
    return answers


def _how_it_ended(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"exit status {returncode}"


def package_rows(options: Namespace, answers: Answers) -> Iterator[Row]:
    """Yield a row for each package, GPU computation included."""
    for name, advice in _ADVICE.items():
        if name in (ON_A_GPU if options.device == "cpu" else ("CPU",)):
            continue
        answer = answers.get(name)
        if answer is None and name in OF_TRANSFORMER_ENGINE:  # whose row says why
            continue
        if answer is None:
            yield Row(name, "failed", "not looked at: what it needs is broken", "see the other rows")
        elif "warning" in answer:
            yield Row(name, "warning", answer["warning"], answer["advice"])
        elif "error" not in answer:
            yield Row(name, "ok", answer["version"])
        elif answer["missing"] and name in _OPTIONAL:
            yield Row(name, _OPTIONAL[name], "not installed", advice)  # type: ignore[arg-type]
        elif name in ("CPU", "megatron-core") and (mismatch := find_version_mismatch()):
            yield Row(name, "failed", mismatch.what, mismatch.remedy)
        else:
            yield Row(name, "failed", answer["error"], answer.get("advice", advice))


def checkpoint_bytes(options: Namespace, answers: Answers) -> int | str:
    """Return the size of a checkpoint, or what stands in the way of knowing it."""
    answer = answers.get("parameters", {"error": "the flags can't be parsed here"})
    if options.parameters:
        # Without the flags of pretraining: bf16 with fp32 master weights and Adam's moments.
        return round(options.parameters * (answer["bytes_each"] if answer.get("parameters") else 14))
    if answer.get("parameters"):
        return answer["parameters"] * answer["bytes_each"]
    return answer.get("error", "the flags don't give the model's size")


def check_python() -> Iterator[Row]:
    """Compare Python with what megatron-core needs."""
    new_enough = sys.version_info >= (3, 12)
    yield Row(
        "Python",
        "ok" if new_enough else "failed",
        platform.python_version(),
        "" if new_enough else "use Python 3.12 or newer",
    )
    home = os.environ.get("HOME", "")
    if not os.access(home or "/", os.W_OK):
        yield Row(
            "home folder",
            "warning",
            f"HOME={home} can't be written",
            "set HOME to a folder that can: caches of compiled kernels go there",
        )


def check_requirements() -> Iterator[Row]:
    """Compare what is installed with what this package requires."""
    # Not before here: it may be missing; that is a row.
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("megatron-periln") or []
    except importlib.metadata.PackageNotFoundError:
        yield Row("requirements", "warning", "megatron-periln is not installed", "pip install -e .")
        return
    wrong = []
    count = 0
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    if wrong:
        yield Row("requirements", "failed", ", ".join(wrong), "pip install -e . -c constraints.txt")
    else:
        yield Row("requirements", "ok", f"all {count} installed")
