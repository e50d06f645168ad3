"""The doctor's command line: a few flags of its own among those of pretraining."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from megatron_periln import flag_files
from megatron_periln.errors import UsageError

__all__ = ["of_pretraining", "parse"]

# Those of the doctor's flags that pretraining doesn't know.
_OWN = frozenset(
    ["--all-reduce", "--json", "--minimum-bandwidth", "--parameters", "--plan", "--timeout", "--world-size"]
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the flags")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return what the command line says; ``flags`` has all of it, flag files expanded.

    Flags of pretraining that the doctor doesn't know are left to pretraining.

    Raises
    ------
    UsageError
        For a value that is wrong, or a flag file that can't be read.
    """
    parser = _Parser(
        prog="python -m megatron_periln.doctor",
        allow_abbrev=False,
        description="Check that this node can train, in one process on each node; under torchrun also "
        "the ranks' clocks and all-reduce. Takes the flags of pretraining too, and @FILE; ends with "
        "status 1 if anything failed, and one line for each cause on standard error.",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu expects no GPU")
    parser.add_argument("--save", help="the folder for checkpoints: tried, and its free space compared")
    parser.add_argument(
        "--data-path", nargs="*", default=[], help="indexed datasets, as pretraining takes them"
    )
    for part in ("train", "valid", "test"):
        parser.add_argument(f"--{part}-data-path", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--data-args-path", help=argparse.SUPPRESS)
    parser.add_argument("--per-split-data-args-path", help=argparse.SUPPRESS)
    parser.add_argument("--mock-data", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--train-iters", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--save-interval", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--parameters",
        type=float,
        metavar="N",
        help="the model's parameters, such as 1.5e9; default: counted from the flags of pretraining",
    )
    parser.add_argument(
        "--all-reduce",
        action="store_true",
        help="with srun, one task a rank: find the other ranks through SLURM_PROCID, SLURM_NTASKS, "
        "MASTER_ADDR and MASTER_PORT (torchrun's ranks find each other without it)",
    )
    parser.add_argument(
        "--minimum-bandwidth",
        type=float,
        metavar="GB/S",
        help="fail below this bus bandwidth of all-reduce; default: warn below 10 on GPUs",
    )
    parser.add_argument(
        "--plan",
        metavar="GPU",
        help="plan the run, too, on GPUs such as h100-80: a run that can't fit fails (docs/plan.md)",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="GPUs of the run that is planned; default: WORLD_SIZE of the environment",
    )
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="SECONDS", help="for each check; default: 120"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    flags = flag_files.expand(argv)
    options = parser.parse_known_args(flags)[0]
    options.flags = flags
    return options


def of_pretraining(options: argparse.Namespace) -> list[str]:
    """Return the flags without those that pretraining doesn't know."""
    return flag_files.without(options.flags, _OWN)
