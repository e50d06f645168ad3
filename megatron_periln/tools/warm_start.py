"""Start Peri-LN training from a Pre-LN checkpoint: insert output norms, their weights fitted to data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_periln.command_line import exit_code, parse_flags, prepare_for_megatron, run_command
from megatron_periln.data.indexed.format import check_indexed_dataset
from megatron_periln.errors import UsageError
from megatron_periln.files import check_new_folder

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", required=True, type=Path, help="a Pre-LN checkpoint")
    parser.add_argument("--ckpt-step", type=int, help="which iteration; default: the latest")
    parser.add_argument("--output", required=True, type=Path, help="the folder to write, for --load")
    parser.add_argument(
        "--insert-output-norms",
        action="store_true",
        help="needed, because the result is another model",
    )
    parser.add_argument(
        "--data-path",
        required=True,
        help="an indexed dataset, without .bin or .idx: fits the weights, and measures the loss",
    )
    parser.add_argument(
        "--seq-length", type=int, help="tokens in a window; default: the checkpoint's own, up to 4096"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Insert the norms and return the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    return exit_code(lambda: _start(parse_flags(build_parser(), argv)))


def _start(args: argparse.Namespace) -> None:
    if not args.insert_output_norms:
        raise UsageError(
            "output norms make another model of a Pre-LN one, whatever their weights; give "
            "--insert-output-norms to have them all the same"
        )
    check_new_folder(args.output, flag="--output")
    check_indexed_dataset(args.data_path, every_sequence=False)
    prepare_for_megatron()
    from megatron_periln import cpu  # imports torch, seconds that what was refused above need not take

    cpu.activate(hide_gpu=True)
    # After the line above, which decides what "cuda" is while Megatron is imported.
    from megatron_periln.convert.warm_start import insert_output_norms

    insert_output_norms(args.load, args.output, args.data_path, args.seq_length, args.ckpt_step)


if __name__ == "__main__":
    run_command(main)
