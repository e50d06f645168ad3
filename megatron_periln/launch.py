"""torchrun that ends with what its ranks have said: ``python -m megatron_periln.launch``, with its flags.

After a rank has failed, torchrun itself raises, and the traceback of its own code and a table of statuses
stand below what the rank has said. Here they don't. All else is torchrun's, its status 1 included.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

__all__ = ["main"]

_NONE = "<N/A>"


def main() -> None:
    """Run torchrun; exit with status 1 if a rank fails, and say so if the rank could not."""
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


if __name__ == "__main__":
    main()
