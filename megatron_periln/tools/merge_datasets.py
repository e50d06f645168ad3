"""Merge indexed datasets, with the flags of Megatron-LM's tool and its bytes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_periln.command_line import exit_code, parse_flags, run_command
from megatron_periln.data.indexed.merge import find_datasets, merge_datasets
from megatron_periln.data.input_order import ORDERS
from megatron_periln.errors import PreprocessError

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: Megatron-LM's flags, ``--inputs``, ``--input-order`` and ``--overwrite``."""
    parser = argparse.ArgumentParser(description=__doc__)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--input", metavar="FOLDER", help="merge every dataset of a folder, in the order of --input-order"
    )
    inputs.add_argument(
        "--inputs",
        nargs="+",
        metavar="PREFIX",
        help="merge these, in this order: prefixes, quoted globs of them, folders",
    )
    parser.add_argument(
        "--input-order",
        choices=ORDERS,
        help="of a folder's or a glob's datasets: natural, part_2 before part_10, the default; "
        "bytes, part_10 before part_2, as Megatron-LM's tool has them",
    )
    parser.add_argument("--output-prefix", required=True, help="writes {prefix}.bin and .idx")
    parser.add_argument(
        "--multimodal", action="store_true", help="insist on the modes of multimodal datasets"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that exists")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Merge and return the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv

    def merge() -> None:
        args = parse_flags(build_parser(), argv)
        if args.input is not None and not Path(args.input).is_dir():
            raise PreprocessError(f"--input {args.input}: no such folder; --inputs takes prefixes")
        differing: list[tuple[str, str]] = []
        prefixes = find_datasets(
            [args.input] if args.input is not None else args.inputs,
            args.input_order or "natural",
            lambda *pair: differing.append(pair),
        )
        if differing and args.input_order is None:
            first, second = (Path(prefix).name for prefix in differing[0])
            print(
                f"note: {first} is taken before {second}; Megatron-LM's tool sorts by bytes, "
                f"{second} before {first}: --input-order bytes",
                file=sys.stderr,
            )
        merged = merge_datasets(
            prefixes,
            args.output_prefix,
            overwrite=args.overwrite,
            multimodal=args.multimodal,
            command=["tools/merge_datasets.py", *argv],
            progress=lambda line: print(line, file=sys.stderr),
        )
        print(merged)

    return exit_code(merge)


if __name__ == "__main__":
    run_command(main)
