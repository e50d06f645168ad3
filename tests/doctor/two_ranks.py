"""Two ranks of the doctor, as torchrun or srun would start them, each forked from this process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from megatron_periln.doctor import communication, software
from megatron_periln.doctor.__main__ import main
from tests.doctor.conftest import FOUND
from tests.ports import free_port


def run(folder, flags, faults, by_srun=False):
    """Return the exit codes, and what each rank wrote; call ``faults[rank]``, of this module, there."""
    port = free_port()
    names = (
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID") if by_srun else ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    processes = []
    for rank in range(2):
        process = os.fork()
        if process == 0:
            try:
                for number, stream in enumerate(("out", "err"), 1):
                    os.dup2(os.open(f"{folder}/{rank}.{stream}", os.O_CREAT | os.O_WRONLY), number)
                    setattr(sys, f"std{stream}", os.fdopen(number, "w"))
                os.environ.update(zip(names, (str(rank), "2", "0"), strict=True))
                os.environ.update(
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SLURMD_NODENAME=f"node{rank}"
                )
                software.probe = lambda _: FOUND
                communication.BYTES = {"cpu": 1 << 20}
                if rank in faults:
                    globals()[faults[rank]]()
                code = main(flags)
                sys.stdout.flush()
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                code = 99
            os._exit(code)
        processes.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    written = [
        [Path(f"{folder}/{rank}.{stream}").read_text() for stream in ("out", "err")] for rank in range(2)
    ]
    return codes, written


def a_clock_ahead():
    """Be a minute ahead of the others."""
    communication.time = SimpleNamespace(time=lambda: time.time() + 60, perf_counter=time.perf_counter)


def a_wrong_sum():
    """Get another sum than the others."""
    import torch

    reduce = torch.distributed.all_reduce

    def damaged(tensor, **options):
        reduce(tensor, **options)
        tensor[7] += 1

    torch.distributed.all_reduce = damaged


def absence():
    """Never come."""
    os._exit(0)
