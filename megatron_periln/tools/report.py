"""Compare monitored runs: one HTML page with their losses, gradients, variances and alerts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_periln.command_line import exit_code, parse_flags, run_command
from megatron_periln.report.page import write_report

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a file that --monitor-layers wrote, or the folder that holds its monitor.jsonl",
    )
    parser.add_argument("--output", required=True, type=Path, help="the page to write, such as report.html")
    parser.add_argument("--title", help="title of the page; default: the runs' names")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and return the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    return exit_code(lambda: _report(parse_flags(build_parser(), argv)))


def _report(args: argparse.Namespace) -> None:
    print(write_report(args.runs, args.output, args.title))


if __name__ == "__main__":
    run_command(main)
