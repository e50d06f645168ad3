"""How the command-line tools end."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_periln.errors import UsageError, tell
from megatron_periln.package_versions import refuse_version_mismatch

__all__ = ["exit_code", "parse_flags", "parse_size", "prepare_for_megatron", "quiet_megatron", "run_command"]

_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def exit_code(action: Callable[[], object]) -> int:
    """Run ``action`` and return the exit code: 0, 1 after an error, 130 after Ctrl-C.

    An error is one line on stderr.
    """
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UsageError, OSError) as error:
        tell(error)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {str(interrupt) or 'nothing was written'}", file=sys.stderr)
        return 130
    except BaseException as error:
        # torch's, which is no Exception; torch is imported by whoever reads a checkpoint.
        if type(error).__name__ != "CheckpointException":
            raise
        print(f"error: a checkpoint can't be read: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says; a flag that is unknown is named before one that is missing.

    Raises
    ------
    UsageError
        For a flag or a value that is wrong.
    """

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the flags")

    parser.error = refuse  # type: ignore[method-assign]
    argv = sys.argv[1:] if argv is None else argv
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in argv:
        flag = argument.partition("=")[0]
        if re.fullmatch(r"--\w[\w-]*", flag) and not any(option.startswith(flag) for option in known):
            near = difflib.get_close_matches(flag, known, n=1)
            refuse(f"unknown flag {flag}" + "".join(f" (did you mean {option}?)" for option in near))
    return parser.parse_args(argv)


def parse_size(value: str) -> int:
    """Return the bytes of a size such as ``512M`` or ``64GB``, for argparse; units are powers of 1024.

    Raises
    ------
    ArgumentTypeError
        If it is none, or 0.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", value.upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{value} is no size such as 512M or 64G")
    return int(match[1]) << _SHIFTS[match[2]]


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` as a command: with a clean end after SIGTERM too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())


def prepare_for_megatron() -> None:
    """Get ready to import Megatron in a tool: check that it can be, and keep warnings from the output.

    Raises
    ------
    UsageError
        If megatron-core can't be imported beside what is installed.
    """
    refuse_version_mismatch()
    quiet_megatron()


def quiet_megatron() -> None:
    """Keep Megatron's and torch's warnings from the output of a tool."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    logging.getLogger("megatron").setLevel(logging.ERROR)
