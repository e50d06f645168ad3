"""Tokenize JSON Lines into Megatron's indexed datasets, with the flags of Megatron-LM's tool."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from megatron_periln.data.documents import find_inputs
from megatron_periln.data.encode import Encoder
from megatron_periln.data.errors import PreprocessError
from megatron_periln.data.preprocess import Summary, output_prefixes, prepare_outputs, preprocess
from megatron_periln.data.sentences import sentence_splitter
from megatron_periln.data.tokenizer import build_tokenizer

__all__ = ["build_parser", "command", "main", "run"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: Megatron-LM's flags, its tokenizer flags among them, and ``--overwrite``."""
    from megatron.training.arguments import _add_tokenizer_args

    parser = _add_tokenizer_args(argparse.ArgumentParser(description=__doc__))
    group = parser.add_argument_group("input data")
    group.add_argument(
        "--input",
        required=True,
        help="JSON Lines file, plain or .gz, or a quoted glob of them, taken in sorted order",
    )
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], help="JSON keys to tokenize, a dataset for each"
    )
    group.add_argument(
        "--split-sentences", action="store_true", help="make each sentence a sequence, with NLTK"
    )
    group.add_argument(
        "--keep-newlines",
        action="store_true",
        help="keep white space between sentences, with --split-sentences",
    )
    group = parser.add_argument_group("tokenization")
    group.add_argument(
        "--append-eod", action="store_true", help="append an end-of-document token to each document"
    )
    group.add_argument("--lang", default="english", help="language of the sentences, with --split-sentences")
    group = parser.add_argument_group("output data")
    group.add_argument(
        "--output-prefix", required=True, help="writes {prefix}_{key}_document.bin and .idx, or _sentence"
    )
    group.add_argument("--overwrite", action="store_true", help="replace datasets that exist")
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--workers",
        type=_positive_integer,
        default=len(os.sched_getaffinity(0)),
        help="worker processes; default: the usable CPUs",
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
        "--log-interval", type=_positive_integer, default=1000, help="documents between lines of progress"
    )
    for flag in ("--find-optimal-num-workers", "--workers-to-check", "--max-documents"):
        nargs = 0 if flag.startswith("--find") else "+"
        group.add_argument(
            flag, nargs=nargs, action=_NotNeeded, help="not needed: --workers has a good default"
        )
    return parser


def run(argv: Sequence[str] | None = None) -> Summary:
    """Parse the flags and preprocess.

    Raises
    ------
    PreprocessError
        What is wrong, in one line.
    """
    parser = build_parser()
    from megatron.core.datasets.indexed_dataset import DType

    args = parser.parse_args(argv)
    inputs = find_inputs(args.input)
    prefixes = output_prefixes(args.output_prefix, args.json_keys, split_sentences=args.split_sentences)
    prepare_outputs(prefixes.values(), overwrite=args.overwrite)
    split = sentence_splitter(args.lang, keep_newlines=args.keep_newlines) if args.split_sentences else None
    tokenizer = build_tokenizer(args)
    encoder = Encoder(
        tokenizer,
        args.json_keys,
        np.dtype(DType.optimal_dtype(tokenizer.vocab_size)),
        append_eod=args.append_eod,
        split=split,
    )
    return preprocess(
        inputs,
        encoder,
        prefixes,
        workers=args.workers,
        partitions=args.partitions,
        keep_sequential_samples=args.keep_sequential_samples,
        log_interval=args.log_interval,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Preprocess and return the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    try:
        print(run(argv), file=sys.stderr)
    except (PreprocessError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def command() -> NoReturn:
    """Run as a command: with clean output, and a clean end after SIGTERM too."""
    # Importing Megatron warns about accelerator packages that preprocessing does not use.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())


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


if __name__ == "__main__":
    command()
