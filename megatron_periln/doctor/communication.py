"""Several ranks: whether they find each other and agree on the time, and how fast they reduce."""

from __future__ import annotations

import datetime
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from megatron_periln.doctor.rows import Row
from megatron_periln.doctor.storage import clock_row
from megatron_periln.errors import UsageError

__all__ = [
    "BYTES",
    "ThisRank",
    "check_all_reduce",
    "check_clocks",
    "connect",
    "disconnect",
    "find_rank",
    "gather",
]

BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
"""What is reduced, by device."""

_SLOW = {"cuda": 10.0, "cpu": 0.0}
"""GB/s of bus bandwidth that only a network without RDMA stays below."""
_ROUNDS = 5


@dataclass(frozen=True)
class ThisRank:
    """A process among the others."""

    rank: int
    size: int
    local_rank: int


def find_rank(all_reduce: bool) -> ThisRank:
    """Return what torchrun says of this rank; or with ``all_reduce`` and without torchrun, SLURM.

    Raises
    ------
    UsageError
        If ``all_reduce`` asks for ranks that nothing tells of.
    """
    environment = os.environ
    if all_reduce and "RANK" not in environment:
        names = {"SLURM_PROCID": "RANK", "SLURM_NTASKS": "WORLD_SIZE", "SLURM_LOCALID": "LOCAL_RANK"}
        missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise UsageError(
                f"--all-reduce: {', '.join(missing)} not set; start the doctor with torchrun, or with srun, "
                "one task a rank, and MASTER_ADDR and MASTER_PORT"
            )
        environment.update({theirs: environment[ours] for ours, theirs in names.items()})
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= set(environment):  # one may be a job script's own
        return ThisRank(0, 1, 0)
    return ThisRank(*(int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def connect(here: ThisRank, seconds: float) -> Iterator[Row]:
    """Let the ranks find each other, over gloo."""
    import torch.distributed as distributed  # seconds, which a rank alone saves

    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    distributed.barrier()
    if here.rank == 0:
        yield Row("rendezvous", "ok", f"{here.size} ranks")


def check_clocks(here: ThisRank, node: str) -> Iterator[Row]:
    """Compare the ranks' clocks, to within the time that a barrier takes."""
    import torch.distributed as distributed  # seconds, which a rank alone saves

    best: list[tuple[float, str]] = []
    for _ in range(_ROUNDS):
        distributed.barrier()
        now = (time.time(), node)
        times: list[tuple[float, str]] = [now] * here.size
        distributed.all_gather_object(times, now)
        if not best or max(times)[0] - min(times)[0] < max(best)[0] - min(best)[0]:
            best = times
    if here.rank == 0:
        (last, ahead), (first, behind) = max(best), min(best)
        yield clock_row("clocks, ranks", last - first, f": {ahead} is ahead of {behind}")


def check_all_reduce(here: ThisRank, options: Namespace) -> Iterator[Row]:
    """Measure the bus bandwidth of all-reduce: 2(n-1)/n bytes over time, as nccl-tests does."""
    # Seconds, which a rank alone saves.
    import torch
    import torch.distributed as distributed

    device = torch.device("cpu")
    group: distributed.ProcessGroup | None = None
    if options.device == "cuda":
        torch.cuda.set_device(here.local_rank)
        device = torch.device("cuda", here.local_rank)
        group = cast(distributed.ProcessGroup, distributed.new_group(backend="nccl"))
    count = BYTES[options.device] // 4
    seconds = []
    right = True
    for _ in range(1 + _ROUNDS):  # the first connects
        tensor = torch.ones(count, device=device)
        distributed.barrier()
        started = time.perf_counter()
        distributed.all_reduce(tensor, group=group)
        right = bool((tensor == here.size).all()) and right  # waits for the GPU
        seconds.append(time.perf_counter() - started)
    speed = 2 * (here.size - 1) / here.size * 4 * count / sorted(seconds[1:])[_ROUNDS // 2] / 1e9
    backend = "NCCL" if group is not None else "gloo"
    value = f"{speed:.2f} GB/s bus bandwidth, {here.size} ranks, {4 * count >> 20} MiB, {backend}"
    if not right:
        yield Row("all-reduce", "failed", f"rank {here.rank} got a wrong sum", "drain the node")
    elif here.rank == 0:
        yield _speed_row(speed, value, options)


def _speed_row(speed: float, value: str, options: Namespace) -> Row:
    advice = "see NCCL_DEBUG=INFO for the network that was chosen, and the site's NCCL settings"
    if options.minimum_bandwidth is not None and speed < options.minimum_bandwidth:
        return Row("all-reduce", "failed", f"{value}, below {options.minimum_bandwidth:g} GB/s", advice)
    if speed < _SLOW[options.device]:
        return Row("all-reduce", "warning", value, advice)
    return Row("all-reduce", "ok", value)


def gather(rows: list[Row], here: ThisRank) -> list[Row]:
    """Return the rows of all ranks, on all ranks."""
    import torch.distributed as distributed  # seconds, which a rank alone saves

    everyone: list[list[Row]] = [[]] * here.size
    distributed.all_gather_object(everyone, rows)
    return [row for theirs in everyone for row in theirs]


def disconnect() -> None:
    """Leave once all ranks have what they need."""
    import torch.distributed as distributed  # seconds, which a rank alone saves

    distributed.barrier()
    distributed.destroy_process_group()
