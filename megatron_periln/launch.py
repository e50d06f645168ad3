"""torchrun that ends with what its ranks have said: ``python -m megatron_periln.launch``, with its flags.

After a rank has failed, torchrun itself raises, and the traceback of its own code and a table of statuses
stand below what the rank has said. Here they don't. And the ranks of a pretraining on the CPU are forked from
it, so that they need not import torch again. All else is torchrun's, its status 1 included.
"""

from __future__ import annotations

import os
import sys

from megatron_periln import flag_files
from megatron_periln.collector import paused
from megatron_periln.endings.at_once import end_at_once
from megatron_periln.errors import UsageError

with paused():
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun
    from torch.distributed.run import parse_args

    from megatron_periln.patches.starting.forked_ranks import fork_ranks, start_as_ranks

__all__ = ["main"]

_NONE = "<N/A>"
_FORKED = "megatron_periln.pretrain"


def main() -> None:
    """Run torchrun; exit with status 1 if a rank fails, and say so if the rank could not."""
    _fork_first()
    try:
        torchrun()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.error_file == _NONE:
            how = f"status {failure.exitcode}" if failure.exitcode >= 0 else failure.signal_name()
            print(
                f"error: rank {rank} (local rank {failure.local_rank}, process {failure.pid}) ended with "
                f"{how}; what it has said is above",
                file=sys.stderr,
            )
        sys.exit(1)


def _fork_first() -> None:
    """Fork the ranks before torchrun has threads and connections, where their number is a number.

    Not those that use a GPU: whether its libraries bear a fork after torch was imported has not been seen.
    """
    options = parse_args(sys.argv[1:])
    ranks = str(options.nproc_per_node)
    if not (options.module and options.training_script == _FORKED and ranks.isdecimal()):
        return
    if not _on_the_cpu(options.training_script_args):
        return
    if int(ranks) > 1 and "OMP_NUM_THREADS" not in os.environ:
        return  # torchrun would set it for them, after they have read it
    start_as_ranks(fork_ranks(int(ranks), _FORKED), _FORKED)


def _on_the_cpu(arguments: list[str]) -> bool:
    try:
        flags = flag_files.expand(arguments)
    except UsageError:
        return False  # which the rank will say
    return flag_files.device_of(flags) == "cpu"


if __name__ == "__main__":
    main()
    if _on_the_cpu(parse_args(sys.argv[1:]).training_script_args):
        end_at_once()
