"""Tokenize text into Megatron's indexed datasets, with the flags of Megatron-LM's tool."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_periln.command_line import exit_code, parse_flags, parse_size, quiet_megatron, run_command
from megatron_periln.data.input_order import ORDERS
from megatron_periln.data.preprocess.driver import preprocess
from megatron_periln.data.preprocess.finalize import check_finished, is_finished
from megatron_periln.data.preprocess.plan import (
    MOST_DOCUMENT_BYTES,
    Plan,
    Summary,
    dataset_prefix,
    prepare_outputs,
)
from megatron_periln.data.preprocess.sentences import sentence_splitter
from megatron_periln.data.readers.inputs import FORMATS, InputFile, find_inputs
from megatron_periln.data.tokenizers.megatron_tokenizer import add_tokenizer_args
from megatron_periln.data.tokenizers.resolve import resolve_tokenizer
from megatron_periln.errors import PreprocessError

__all__ = ["build_parser", "main", "run"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: Megatron-LM's flags, its tokenizer flags among them, and more."""
    parser = add_tokenizer_args(argparse.ArgumentParser(description=__doc__))
    group = parser.add_argument_group("input data")
    group.add_argument(
        "--input",
        required=True,
        nargs="+",
        help="JSON Lines, Parquet, plain text, compressed or not: files, quoted globs, folders; - for stdin",
    )
    group.add_argument(
        "--input-order",
        choices=ORDERS,
        help="of a folder's or a glob's files: bytes, part_10 before part_2, the default; natural, part_2 "
        "before part_10, as merge_datasets.py has them",
    )
    group.add_argument(
        "--input-format", choices=FORMATS, default="auto", help="format of the input; auto: by its suffix"
    )
    group.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        help="JSON keys or columns to tokenize, a dataset for each",
    )
    group.add_argument(
        "--on-error",
        choices=("stop", "skip", "quarantine"),
        default="stop",
        help="what to do with bad documents; quarantine writes them to {output-prefix}_quarantine.jsonl",
    )
    group.add_argument(
        "--max-document-bytes",
        type=parse_size,
        metavar="SIZE",
        help="largest document to read, such as 256M, the default; larger ones are bad documents, and "
        "without this flag texts that need more than 4 GB to be encoded",
    )
    group.add_argument(
        "--split-sentences", action="store_true", help="make each sentence a sequence, with NLTK"
    )
    group.add_argument(
        "--keep-newlines",
        action="store_true",
        help="keep white space between sentences, with --split-sentences",
    )
    group.add_argument("--lang", default="english", help="language of the sentences, with --split-sentences")
    group = parser.add_argument_group("tokenization")
    group.add_argument(
        "--append-eod", action="store_true", help="append an end-of-document token to each document"
    )
    group.add_argument(
        "--encoder",
        choices=("gigatoken", "tokenizers", "sentencepiece", "tiktoken", "megatron"),
        help="what encodes; default: the fastest that gives Megatron's ids",
    )
    group = parser.add_argument_group("output data")
    group.add_argument(
        "--output-prefix", required=True, help="writes {prefix}_{key}_document.bin and .idx, or _sentence"
    )
    group.add_argument(
        "--max-bin-size",
        type=parse_size,
        metavar="SIZE",
        help="start another, numbered dataset before a .bin file exceeds this, such as 64G",
    )
    group.add_argument("--overwrite", action="store_true", help="replace datasets that exist")
    group.add_argument(
        "--resume", action="store_true", help="go on with an unfinished run; a finished one stays"
    )
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--workers",
        type=_positive_integer,
        default=len(os.sched_getaffinity(0)),
        help="worker processes; default: the usable CPUs",
    )
    group.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="encode part I, from 0, of N consecutive parts of the input; merge them with merge_datasets.py",
    )
    group.add_argument(
        "--partitions",
        type=_positive_integer,
        default=1,
        help="order documents as Megatron-LM does with so many partitions; reads the input once for each",
    )
    group.add_argument(
        "--keep-sequential-samples",
        action="store_true",
        help="keep the order of the input whatever --partitions says",
    )
    group.add_argument(
        "--log-interval",
        type=_positive_integer,
        help="documents between lines of progress where stderr is no terminal; default: none",
    )
    for flag in ("--find-optimal-num-workers", "--workers-to-check", "--max-documents"):
        nargs = 0 if flag.startswith("--find") else "+"
        group.add_argument(
            flag, nargs=nargs, action=_NotNeeded, help="not needed: --workers has a good default"
        )
    return parser


def run(argv: Sequence[str]) -> Summary | str:
    """Parse the flags and preprocess; return what to tell.

    Raises
    ------
    PreprocessError
        What is wrong, in one line.
    """
    args = parse_flags(build_parser(), argv)
    partitions = 1 if args.keep_sequential_samples else args.partitions
    if partitions > 1 and args.shard[1] > 1:
        raise PreprocessError("--partitions reorders the whole input, so it cannot go with --shard: drop one")
    keys = list(dict.fromkeys(args.json_keys))
    inputs = _inputs(args)
    first = 0 if args.max_bin_size else None
    prefixes = [
        dataset_prefix(args.output_prefix, key, sentences=args.split_sentences, number=first) for key in keys
    ]
    finished = args.resume and not args.overwrite and is_finished(args.output_prefix, prefixes)
    if not finished:
        prepare_outputs(
            args.output_prefix,
            prefixes,
            quarantine=args.on_error == "quarantine",
            resume=args.resume,
            overwrite=args.overwrite,
        )
    split = sentence_splitter(args.lang, keep_newlines=args.keep_newlines) if args.split_sentences else None
    plan = Plan(
        inputs=inputs,
        output_prefix=args.output_prefix,
        tokenizer=resolve_tokenizer(args),
        tokenizer_type=args.tokenizer_type,
        keys=keys,
        append_eod=args.append_eod,
        split=split,
        split_name=f"{args.lang}, newlines {args.keep_newlines}" if split else None,
        encoder=args.encoder,
        workers=args.workers,
        partitions=partitions,
        shard=args.shard,
        max_bin_size=args.max_bin_size,
        max_document_bytes=args.max_document_bytes or MOST_DOCUMENT_BYTES,
        any_size=args.max_document_bytes is not None,
        on_error=args.on_error,
        resume=args.resume,
        overwrite=args.overwrite,
        command=[Path(__file__).name, *argv],
    )
    return check_finished(plan) if finished else preprocess(plan, args.log_interval)


def main(argv: Sequence[str] | None = None) -> int:
    """Preprocess and return the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    quiet_megatron()
    return exit_code(lambda: print(run(sys.argv[1:] if argv is None else argv), file=sys.stderr))


def _inputs(args: argparse.Namespace) -> list[InputFile]:
    differing: list[tuple[Path, Path]] = []
    order = args.input_order or "bytes"
    inputs = find_inputs(args.input, args.input_format, order, lambda *pair: differing.append(pair))
    if differing and args.input_order is None:
        first, second = (path.name for path in differing[0])
        print(
            f"note: {first} is read before {second}, in the order of bytes; {second} before {first}, as "
            "merge_datasets.py has them: --input-order natural",
            file=sys.stderr,
        )
    return inputs


class _NotNeeded(argparse.Action):
    def __call__(self, *_: object) -> None:
        raise PreprocessError(
            f"{self.option_strings[0]} is not needed, drop it: --workers defaults to the usable CPUs"
        )


def _positive_integer(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive integer")
    return number


def _shard(value: str) -> tuple[int, int]:
    try:
        shard, shards = map(int, value.split("/"))
    except ValueError:
        shard = shards = -1
    if not 0 <= shard < shards:
        raise argparse.ArgumentTypeError(f"{value} is not I/N with 0 <= I < N, such as 0/8")
    return shard, shards


if __name__ == "__main__":
    run_command(main)
