"""Whether the model that the flags describe trains here: a step of two of its layers, on all GPUs at once."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from megatron_periln.doctor.rows import Row
from megatron_periln.doctor.software import Answers
from megatron_periln.doctor.timeouts import run_within

__all__ = ["CHECK", "check_model_step", "describes_a_model"]

CHECK = "model, two layers"

_DESCRIBES = {"--num-layers", "--hybrid-layer-pattern"}
_LOSS = re.compile(r"lm loss: *([\d.E+-]+|nan|inf)", re.IGNORECASE)


def describes_a_model(options: Namespace) -> bool:
    """Tell whether the flags are those of a model."""
    return bool(_DESCRIBES & {word.partition("=")[0] for word in options.flags})


def check_model_step(options: Namespace, answers: Answers) -> Iterator[Row]:
    """Train the model with two layers for a step, on each GPU of this node, or on the CPU."""
    count = 1 if options.device == "cpu" else answers.get("CUDA", {}).get("gpus", 0)
    if not count:
        yield Row(CHECK, "failed", "no GPU to try it on", "see the other rows")
        return
    with ThreadPoolExecutor(count) as pool:
        outcomes = list(pool.map(lambda index: _step(options, index), range(count)))
    failed = [outcome for outcome in outcomes if outcome.status != "ok"]
    yield from failed or [Row(CHECK, "ok", _all_well(options, outcomes))]


def _all_well(options: Namespace, outcomes: list[Row]) -> str:
    where = "the CPU" if options.device == "cpu" else f"{len(outcomes)} GPUs"
    losses = sorted({outcome.value for outcome in outcomes})
    return f"a step on {where}, loss {' .. '.join(losses[:1] + losses[1:][-1:])}"


def _step(options: Namespace, index: int) -> Row:
    """Return the outcome on one device: its loss, or what went wrong."""
    where = "" if options.device == "cpu" else f"GPU {index}: "
    command = [sys.executable, "-W", "ignore", "-m", "megatron_periln.doctor.two_layers", *options.flags]
    try:
        done = run_within(command, options.timeout, env=_alone(index))
    except subprocess.TimeoutExpired:
        return Row(CHECK, "failed", f"{where}no end in {options.timeout:g} s", "give a longer --timeout")
    losses = _LOSS.findall(done.stdout)
    if done.returncode == 0 and losses:
        return Row(CHECK, "ok", f"{float(losses[-1]):.3f}")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    cause = (told or [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)] or lines)[-1:]
    if "OutOfMemoryError" in "".join(cause):
        return Row(CHECK, "warning", f"{where}two layers don't fit one GPU", "train to see whether it fits")
    code = done.returncode
    end = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return Row(CHECK, "failed", where + (cause[0] if cause else end), "" if told else "see the other rows")


def _free_port() -> int:
    """Return a port that no connection is given meanwhile: below the range from which port 0 would choose."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


def _alone(index: int) -> dict[str, str]:
    """Return the environment of a job of one rank, on one of this process's GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(index + 1)]
    # Not torchrun's, nor a store that it has started.
    theirs = ("TORCHELASTIC", "GROUP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return environment | {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "CUDA_VISIBLE_DEVICES": "" if visible == "" else gpus[index],
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
