"""Write an exported model as a GGUF file for llama.cpp, and compare token ids and logits there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_periln.command_line import exit_code, parse_flags, prepare_for_megatron, run_command
from megatron_periln.convert.gguf.processes import LlamaCpp
from megatron_periln.convert.model_folder import check_model_folder
from megatron_periln.errors import UsageError

__all__ = ["build_parser", "main"]

KINDS = ("auto", "f32", "f16", "bf16", "q8_0")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", required=True, type=Path, help="the folder that export-hf wrote, with a tokenizer"
    )
    parser.add_argument("--output", required=True, type=Path, help="the file to write")
    parser.add_argument(
        "--llama-cpp",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="a checkout of llama.cpp, or the unpacked source of llama-cpp-python: its converter is used",
    )
    parser.add_argument(
        "--llama-cpp-python",
        metavar="PYTHON",
        help="a Python with cyllama or llama-cpp-python, in which the file is tried; default: this one",
    )
    parser.add_argument(
        "--outtype", choices=KINDS, default="auto", help="of the weights; default: auto, 16 bits as they are"
    )
    parser.add_argument(
        "--pre-tokenizer",
        metavar="NAME",
        help="llama.cpp's name to take, and tell how many ids differ; default: the one that gives the ids",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write and return the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    return exit_code(lambda: _write(parse_flags(build_parser(), argv)))


def _write(args: argparse.Namespace) -> None:
    check_model_folder(args.model)
    if args.output.is_dir() or not args.output.absolute().parent.is_dir():
        raise UsageError(f"--output {args.output}: give a file's name in a folder that is there")
    llama_cpp = LlamaCpp.find(args.llama_cpp, args.llama_cpp_python)
    prepare_for_megatron()
    # Seconds that what was refused above need not take.
    from megatron_periln import cpu

    cpu.activate(hide_gpu=True)
    # After the line above, which decides what "cuda" is while Megatron is imported.
    from megatron_periln.convert.gguf.write import GGUFOptions, write_gguf

    options = GGUFOptions(llama_cpp=llama_cpp, kind=args.outtype, pre_tokenizer=args.pre_tokenizer)
    write_gguf(args.model, args.output, options)


if __name__ == "__main__":
    run_command(main)
