"""Export a checkpoint to a model of transformers, and compare the logits of both."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_periln.command_line import exit_code, parse_flags, parse_size, prepare_for_megatron, run_command
from megatron_periln.convert.targets import TARGETS
from megatron_periln.files import check_new_folder

__all__ = ["build_parser", "main"]

DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--load", required=True, type=Path, help="the folder that --save wrote; any parallel layout"
    )
    parser.add_argument("--ckpt-step", type=int, help="which iteration; default: the latest")
    parser.add_argument("--output", required=True, type=Path, help="the folder to write")
    parser.add_argument(
        "--target",
        choices=("auto", *TARGETS),
        default="auto",
        help="the architecture; default: auto, the first that computes the same",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as in the checkpoint")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="folder with the tokenizer's files, or its model file; default: that of the checkpoint",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer files")
    parser.add_argument(
        "--data-path",
        nargs="+",
        metavar="PREFIX",
        help="indexed datasets of which the tokenizer must give the ids; default: the checkpoint's",
    )
    parser.add_argument(
        "--max-shard-size",
        type=parse_size,
        default="1G",
        metavar="SIZE",
        help="of a safetensors file; so much is held in memory; default: 1G",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="skip the parity check, which runs both models in fp32; for models too large for that",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export and return the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    return exit_code(lambda: _export(parse_flags(build_parser(), argv)))


def _export(args: argparse.Namespace) -> None:
    check_new_folder(args.output, flag="--output")
    prepare_for_megatron()
    import torch  # seconds that what was refused above need not take

    from megatron_periln import cpu

    cpu.activate(hide_gpu=True)
    # After the line above, which decides what "cuda" is while Megatron is imported.
    from megatron_periln.convert.export import ExportOptions, export

    options = ExportOptions(
        target=args.target,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        tokenizer=args.tokenizer,
        with_tokenizer=not args.no_tokenizer,
        data=args.data_path,
        shard_bytes=args.max_shard_size,
        verify=not args.no_verify,
    )
    export(args.load, args.output, options, step=args.ckpt_step)


if __name__ == "__main__":
    run_command(main)
