"""Import a model of transformers as a checkpoint to go on training, and compare the logits of both."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_periln.command_line import exit_code, parse_flags, prepare_for_megatron, run_command
from megatron_periln.convert.model_folder import check_model_folder
from megatron_periln.files import check_new_folder

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", required=True, type=Path, help="folder with config.json and safetensors files"
    )
    parser.add_argument("--output", required=True, type=Path, help="the folder to write, for --load")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the checkpoint; default: as in the model",
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=_positive,
        default=1,
        metavar="N",
        help="pad the vocabulary, which tensor parallelism must divide, to a multiple of N; default: 1",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="skip the parity check, which runs both models in fp32; for models too large for that",
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Import and return the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    return exit_code(lambda: _import(parse_flags(build_parser(), argv)))


def _import(args: argparse.Namespace) -> None:
    check_model_folder(args.model)
    check_new_folder(args.output, flag="--output")
    prepare_for_megatron()
    import torch  # seconds that what was refused above need not take

    from megatron_periln import cpu

    cpu.activate(hide_gpu=True)
    # After the line above, which decides what "cuda" is while Megatron is imported.
    from megatron_periln.convert.import_model import ImportOptions, import_model

    dtype = getattr(torch, args.dtype) if args.dtype else None
    options = ImportOptions(
        dtype=dtype, verify=not args.no_verify, vocabulary_multiple=args.make_vocab_size_divisible_by
    )
    import_model(args.model, args.output, options)


if __name__ == "__main__":
    run_command(main)
