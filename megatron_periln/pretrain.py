"""Pretrain a GPT with a norm placement: ``torchrun --nproc-per-node N -m megatron_periln.pretrain``.

Takes every flag of Megatron's GPT pretraining, and those of the norm placement group; ``--help``
lists them. ``@FILE`` stands for the flags in a file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

from megatron_periln import flag_files
from megatron_periln.collector import paused
from megatron_periln.endings.at_once import end_at_once
from megatron_periln.endings.children import be_a_child, end_children, keep_no_orphans
from megatron_periln.endings.in_time import ends_in_time
from megatron_periln.endings.launcher import end_with_launcher, wait_for_launcher
from megatron_periln.errors import FLAG, TRACEBACK, RankError, UsageError, tell
from megatron_periln.package_versions import refuse_version_mismatch

PROGRAM_START = time.time()

__all__ = ["choose_device", "main"]


def choose_device(argv: list[str]) -> None:
    """Make ``--device`` true before megatron is imported, which decides much while being imported.

    And ``--traceback`` for what is wrong from then on.

    Raises
    ------
    UsageError
        If there is no such device here.
    """
    import torch  # seconds that a flag file which can't be read need not take

    from megatron_periln import cpu

    if FLAG in argv:
        os.environ[TRACEBACK] = "1"
    # Help is the same for any device, and there a second sooner on the CPU.
    helps = bool({"-h", "--help", "--help-all"} & set(argv))
    if helps or flag_files.device_of(argv) == "cpu":
        try:
            cpu.activate(hide_gpu=helps)
        except RuntimeError as error:
            raise UsageError(str(error)) from error
    elif not torch.cuda.is_available():
        raise UsageError(
            "no GPU is visible to this process; give --device cpu to train on the CPU, or check "
            "`nvidia-smi` and CUDA_VISIBLE_DEVICES"
        )


def _tell_torchrun(cause: str) -> None:
    """Have torchrun's own report, which comes last, name the cause (torch.distributed.elastic's errors)."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": cause, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": message}))


def _failure(end: SystemExit) -> UsageError | None:
    """Return what to tell of an end without a status; None for one that is none.

    Megatron leaves by ``sys.exit()``, with status 0, where it can't go on, and by ``exit()``, which is
    Python's, once it has converted a checkpoint.
    """
    *_, (frame, line) = traceback.walk_tb(end.__traceback__)
    _, inside, file = frame.f_code.co_filename.rpartition("/megatron/")
    if end.code is not None or not inside:
        return None
    return UsageError(f"Megatron ended this run, as failed (megatron/{file}:{line}); the log says why above")


def main() -> None:
    """Run the command line; exit with status 1 and one line on standard error for bad input.

    However it ends, the processes that it has started have ended before.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    end_with_launcher()
    try:
        sys.argv[1:] = flag_files.expand(sys.argv[1:])
        keep_no_orphans()
        refuse_version_mismatch()
        with paused():
            choose_device(sys.argv[1:])
            # After the line above, which decides what "cuda" is while Megatron is imported.
            from megatron_periln.training.run import run

        run(PROGRAM_START)
    except UsageError as error:
        speaks = isinstance(error, RankError) or os.environ.get("RANK", "0") == "0"
        tell(error, speaks=speaks)
        _tell_torchrun(str(error))
        if not speaks:
            wait_for_launcher()
        sys.exit(error.status)
    except SystemExit as end:
        if (failure := _failure(end)) is None:
            raise
        tell(failure, speaks=os.environ.get("RANK", "0") == "0")
        sys.exit(1)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted: what has been saved is complete", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    finally:
        end_children()


if __name__ == "__main__":
    with ends_in_time():
        main()
    if flag_files.device_of(sys.argv[1:]) == "cpu":  # profilers of GPUs write at the end of a process
        end_at_once()
elif __name__ == "__mp_main__":  # in a process that a rank spawns
    be_a_child()
