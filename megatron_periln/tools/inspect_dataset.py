"""Say what an indexed dataset holds, and verify that it is what was written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

from megatron_periln.command_line import exit_code, parse_flags, quiet_megatron, run_command
from megatron_periln.data.indexed.decoding import Detokenizer, decode_documents
from megatron_periln.data.indexed.format import without_suffix
from megatron_periln.data.indexed.inspection import Inspection, LengthStatistics, inspect, verify
from megatron_periln.data.tokenizers.megatron_tokenizer import (
    add_tokenizer_args,
    build_tokenizer,
    check_tokenizer_files,
)

__all__ = ["build_parser", "main"]

_BAR = 40


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: its own flags, and Megatron's tokenizer flags for ``--decode``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", help="the dataset, with or without .bin or .idx")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all of it: layout, checksums of the sidecar, and tokens below --vocab-size, "
        "or the sidecar's vocabulary size",
    )
    parser.add_argument(
        "--decode", type=int, default=0, metavar="N", help="decode N documents, with the tokenizer flags"
    )
    parser.add_argument("--decode-tokens", type=int, default=64, help="tokens of each document decoded")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return add_tokenizer_args(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Inspect and return the exit code: 0, 1 where something is wrong, 130 after Ctrl-C."""
    quiet_megatron()

    def report() -> None:
        args = parse_flags(build_parser(), argv)
        print(_as_json(_report(args)) if args.json else _as_text(_report(args)))

    return exit_code(report)


def _report(args: argparse.Namespace) -> dict[str, Any]:
    if args.decode > 0:
        check_tokenizer_files(args)
    inspection: Inspection = inspect(without_suffix(args.prefix))
    report: dict[str, Any] = {"inspection": inspection}
    if args.verify:
        report["verification"] = verify(inspection, args.vocab_size)
    if args.decode > 0:
        tokenizer = cast(Detokenizer, build_tokenizer(args))
        samples = decode_documents(inspection.dataset, tokenizer, args.decode, args.decode_tokens)
        report["samples"] = list(samples)
    return report


def _as_json(report: dict[str, Any]) -> str:
    content = report["inspection"].to_dict()
    if "verification" in report:
        content["verification"] = asdict(report["verification"])
    if "samples" in report:
        content["samples"] = [asdict(sample) for sample in report["samples"]]
    return json.dumps(content, indent=2)


def _as_text(report: dict[str, Any]) -> str:
    inspection: Inspection = report["inspection"]
    info, sidecar = inspection.dataset.info, inspection.sidecar
    lines = [
        f"dataset    {inspection.dataset.prefix}",
        f"documents  {info.documents:,} ({inspection.document_lengths.empty:,} empty)",
        f"sequences  {info.sequences:,}",
        f"tokens     {info.tokens:,} ({info.dtype})",
        f"files      .bin {inspection.bin_bytes:,} bytes, .idx {inspection.idx_bytes:,} bytes",
    ]
    if sidecar is None:
        lines.append("sidecar    none")
    else:
        kind, encoder = sidecar.tokenizer["type"], sidecar.tokenizer["encoder"]
        lines += [
            f"sidecar    {kind} with {sidecar.tokenizer['vocab_size']:,} ids by {encoder}, {sidecar.created}",
            f"           {'an' if sidecar.append_eod else 'no'} end-of-document token after each document",
            f"           skipped: {json.dumps(sidecar.skipped)[1:-1] or 'none'}",
        ]
    if verified := report.get("verification"):
        vocabulary = f" of {verified.vocab_size}" if verified.vocab_size is not None else ""
        lines += [
            f"checksums  {'as in the sidecar' if verified.checksums else 'not compared: no sidecar'}",
            f"token ids  {verified.smallest} to {verified.largest}{vocabulary}",
        ]
    lines += ["", *_lengths("tokens in a document", inspection.document_lengths)]
    if info.sequences != info.documents - inspection.document_lengths.empty:
        lines += ["", *_lengths("tokens in a sequence", inspection.sequence_lengths)]
    for sample in report.get("samples", []):
        cut = "" if len(sample.ids) == sample.tokens else f", the first {len(sample.ids)}"
        lines += ["", f"document {sample.document} ({sample.tokens} tokens{cut}): {sample.text!r}"]
    return "\n".join(lines)


def _lengths(title: str, lengths: LengthStatistics) -> list[str]:
    ends = [f"{first}" if first == last else f"{first}-{last}" for first, last, _ in lengths.histogram]
    most = max(count for *_, count in lengths.histogram)
    width = max(map(len, ends))
    return [
        f"{title}: min {lengths.min}, median {lengths.median:g}, mean {lengths.mean:.1f}, "
        f"p99 {lengths.p99:g}, max {lengths.max}",
        *(
            f"  {end:>{width}}  {'#' * -(-_BAR * count // most):{_BAR}}  {count:,}"
            for end, (*_, count) in zip(ends, lengths.histogram, strict=True)
        ),
    ]


if __name__ == "__main__":
    run_command(main)
