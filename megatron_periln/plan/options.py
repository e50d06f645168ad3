"""The plan's command line: a few flags of its own among those of pretraining."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_periln import flag_files
from megatron_periln.errors import UsageError

__all__ = ["PLACEMENTS", "labelled_layouts", "parse"]

PLACEMENTS = (
    *("pre", "post", "peri", "output"),
    *("deepnorm", "keel", "ln-scaling", "mix-ln", "hybrid-norm", "scaled-peri", "gated-peri", "gpas"),
)
"""Their names; the placements themselves import Megatron."""


def _count(text: str) -> int:
    value = int(text.replace(",", ""))
    if value < 1:
        raise ValueError
    return value


def _share(text: str) -> float:
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share such as 0.4 or 40%")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value * 1e9


_count.__name__, _rate.__name__ = "positive number", "rate"  # as argparse tells of them


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}; --help lists the flags")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m megatron_periln.plan",
        allow_abbrev=False,
        description="Plan a run before it is launched: what each kind of rank needs of its GPU, from the "
        "real model built without memory, what is sent over which links, and how long it takes. Takes the "
        "flags of pretraining too, and @FILE; needs no GPU. Ends with status 1 if the run does not fit.",
    )
    parser.add_argument(
        "--world-size", type=_count, required=True, metavar="N", help="the number of GPUs of the run"
    )
    parser.add_argument(
        "--gpu",
        default="h100-80",
        help="a100-40, a100-80, h100-80, h200-141, gh200-96, b200-180, gb200-186, or GiB; default: h100-80",
    )
    parser.add_argument(
        "--nodes-of",
        type=_count,
        metavar="N",
        help="GPUs of a node, or of an NVLink domain; default: the GPU's",
    )
    parser.add_argument(
        "--mfu",
        type=_share,
        default=0.4,
        metavar="SHARE",
        help="the share of the GPU's dense BF16 peak that the run reaches, in FP8 too; default: 0.4",
    )
    parser.add_argument(
        "--network", type=_rate, metavar="GB/S", help="what a GPU sends to other nodes; default: the GPU's"
    )
    parser.add_argument(
        "--disk",
        type=_rate,
        default=10e9,
        metavar="GB/S",
        help="what all ranks together write of a checkpoint; default: 10",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        action="extend",
        default=[],
        metavar="FLAGS",
        help="several runs in one table: each a placement, or quoted flags that replace the run's, such as "
        '"--tensor-model-parallel-size 4 --sequence-parallel"',
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write one HTML page with figures, too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--brief", action="store_true", help="print one line: whether the run fits")
    parser.add_argument(
        "--no-changes",
        action="store_true",
        help="don't look for what would make it fit, which takes a plan each",
    )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return what the command line says; ``flags`` has what is pretraining's, flag files expanded.

    Raises
    ------
    UsageError
        For a value that is wrong, or a flag file that can't be read.
    """
    options, flags = _parser().parse_known_args(flag_files.expand(argv))
    options.flags = flags
    if not flags:
        raise UsageError("give the flags of pretraining, or a file of them as @FILE; --help lists the others")
    return options


def labelled_layouts(options: argparse.Namespace) -> list[tuple[str, list[str], int]]:
    """Return a label, all flags, and the number of GPUs of each run to be compared.

    Raises
    ------
    UsageError
        For one whose quotes don't match, or whose ``--world-size`` is no number.
    """
    found = []
    for text in options.compare:
        words = ["--norm-placement", text] if text in PLACEMENTS else _words(text)
        own = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
        own.add_argument("--world-size", type=_count, default=options.world_size)
        own.error = _parser().error  # type: ignore[method-assign]
        given, more = own.parse_known_args(words)
        found.append((text, [*options.flags, *more], given.world_size))
    return found


def _words(text: str) -> list[str]:
    try:
        words = flag_files.expand(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--compare {text!r}: {error}; check its quotes") from error
    if not words or not words[0].startswith("--"):
        raise UsageError(
            f"--compare {text!r}: is no placement ({', '.join(PLACEMENTS)}), and no flags such as "
            '"--tensor-model-parallel-size 4"'
        )
    return words
