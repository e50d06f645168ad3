"""Preprocessing side by side: ours, Megatron-LM's tools, other tools, and the raw encoder as the ceiling.

All in one run on one corpus of real text, taking turns; before any figure counts, the bytes of ours must
equal those of Megatron-LM 0.19. See benchmarks/README.md.

    python benchmarks/preprocess.py --megabytes 20 --work /tmp/preprocess --output results.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import command, machine
from preprocess_peers.contestants import BEFORE, COLD, OURS, RAW, Contestant, Job, contestants
from preprocess_peers.corpus import Corpus, build_corpus, default_roots, describe, split_corpus
from preprocess_peers.measure import Measurement, measure
from preprocess_peers.results import Row, as_json, beside, goals, peer_versions, table
from preprocess_peers.train import TOKENIZERS, tokenizer_files

from megatron_periln.data.indexed.format import DTYPES, HEADER

REFERENCE = "megatron-0.19"
SLOW_SAMPLING = 0.02  # the share of a core that sampling the memory of a timed run may take


class Benchmark:
    """The contestants' runs and what they gave."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        if not options.keep_cache:
            shutil.rmtree(self.work / "cache", ignore_errors=True)
        self.corpus = self._corpus()
        self.tokenizers = self.work / f"tokenizers-{self.corpus.sha256[:8]}"
        self.rows: dict[tuple[str, int, str], Row] = {}

    def _corpus(self) -> Corpus:
        path = self.options.corpus
        if path is None:
            path = self.work / f"corpus-{self.options.megabytes:g}.jsonl"
            if not path.exists():
                build_corpus(path, self.options.root or default_roots(), self.options.megabytes)
        corpus = describe(path)
        if self.options.corpus is None and corpus.bytes < self.options.megabytes * 1e6:
            say(f"there is only {corpus.bytes / 1e6:.0f} MB of distinct text: that is what counts below")
        return corpus

    def run(self) -> None:
        """Run everything: in each round each contestant has its turn."""
        chosen = contestants(self.options)
        chosen = {name: chosen[name] for name in chosen if name in self.options.contestants}
        for turn in range(self.options.repeats):
            for workers in self.options.workers:
                for name in self.options.tokenizers:
                    for contestant in chosen.values():
                        self._take_turn(contestant, name, workers, turn)

    def _take_turn(self, contestant: Contestant, name: str, workers: int, turn: int) -> None:
        tokenizer = tokenizer_files(name, self.tokenizers, self.corpus.path)
        alone = contestant.slow and contestant.name != COLD
        if (
            tokenizer.kind not in contestant.kinds
            or (contestant.slow and turn)
            or (alone and workers not in self.options.slow_workers)
        ):
            return
        job = Job(
            tokenizer=tokenizer,
            workers=workers,
            corpus=self.corpus.path,
            parts=self.work / f"parts-{workers}",
            output=self.work / "output",
            cache=self.work / f"cache/{name}-{workers}",
        )
        row = self._row(contestant, job)
        if contestant.name == COLD:
            shutil.rmtree(job.cache, ignore_errors=True)
        if contestant.slow:
            row.memory = self._measure(contestant, job, row, SLOW_SAMPLING)
            row.samples.append(row.memory)
        else:
            row.memory = row.memory or self._measure(contestant, job, row, 1)
            row.samples.append(self._measure(contestant, job, row, 0))
        taken = row.samples[-1]
        say(
            f"{name}, {workers} workers, {contestant.name}: {taken.seconds:.2f} s ({taken.cpu_seconds:.2f} s)"
        )

    def _row(self, contestant: Contestant, job: Job) -> Row:
        key = (job.tokenizer.name, job.workers, contestant.name)
        if key not in self.rows:
            size = self.corpus.bytes
            if contestant.reads_parts:
                shutil.rmtree(job.parts, ignore_errors=True)
                size = split_corpus(job.corpus, job.parts, job.workers, self.options.peer_megabytes)
            self.rows[key] = Row(*key, size)
        return self.rows[key]

    def _measure(self, contestant: Contestant, job: Job, row: Row, memory: float) -> Measurement:
        shutil.rmtree(job.output, ignore_errors=True)
        job.output.mkdir()
        subprocess.run(["sync"], check=True)
        environment = {"HF_HUB_OFFLINE": "1", **contestant.environment(job)}
        log = self.work / f"{contestant.name.replace(', ', '-').replace(' ', '-')}.log"
        timeout = self.options.timeout
        taken = measure(contestant.command(job), environment, log, memory=memory, timeout=timeout)
        row.output_bytes = sum(path.stat().st_size for path in job.output.rglob("*") if path.is_file())
        if contestant.name == RAW:
            result = json.loads((job.output / "result.json").read_text())
            row.tokens = result["tokens"]
            taken = Measurement(
                result["seconds"], result["cpu_seconds"], taken.peak_bytes, taken.peak_anonymous_bytes
            )
        if contestant.writes_megatron:
            self._check_output(contestant, job, row)
        shutil.rmtree(job.output)
        return taken

    def _check_output(self, contestant: Contestant, job: Job, row: Row) -> None:
        """Note what was written; stop everything if ours differs from Megatron-LM's."""
        prefix = job.output / "data_text_document"
        for suffix in (".bin", ".idx"):
            with prefix.with_suffix(suffix).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if row.digests.setdefault(suffix, digest) != digest:
                raise SystemExit(f"{contestant.name}, {job.tokenizer.name}: {suffix} changed between runs")
        with prefix.with_suffix(".idx").open("rb") as stream:
            itemsize = DTYPES[HEADER.unpack(stream.read(HEADER.size))[2]].itemsize
        row.tokens = prefix.with_suffix(".bin").stat().st_size // itemsize
        rows = [other for other in self.rows.values() if other.tokenizer == row.tokenizer and other.digests]
        reference = next((other.digests for other in rows if other.contestant == REFERENCE), None)
        for other in rows:
            if reference and other.contestant in (OURS, COLD) and other.digests != reference:
                raise SystemExit(f"WRONG BYTES: {other.contestant} differs from {REFERENCE}: {row.tokenizer}")
        own = [other.digests for other in rows if other.contestant in (OURS, COLD, BEFORE)]
        if any(digests != own[0] for digests in own):
            raise SystemExit(f"WRONG BYTES: ours differs from {BEFORE}: {row.tokenizer}")

    def checked(self) -> dict[str, str]:
        """Tell how the output of each contestant compares with that of 0.19's, where that is known.

        Bytes are compared, and for the raw encoder the number of tokens without ends of documents.
        """
        result = {}
        references = {row.tokenizer: row for row in self.rows.values() if row.contestant == REFERENCE}
        for (name, workers, contestant), row in self.rows.items():
            reference = references.get(name)
            if contestant == REFERENCE or reference is None or row.tokens is None:
                continue
            if contestant == RAW:
                same = row.tokens + self.corpus.documents == reference.tokens
                word = f"{'same' if same else 'another'} number of tokens"
            else:
                word = "identical" if row.digests == reference.digests else "different"
            result[f"{name}, {workers} workers, {contestant}"] = word
        return result


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (REFERENCE, COLD, BEFORE, OURS, "megatron-main", RAW, "datatrove", "dolma")
    parser.add_argument("--corpus", type=Path, help="JSON Lines with a text each; default: built")
    parser.add_argument("--megabytes", type=float, default=362, help="size of the built corpus")
    parser.add_argument("--root", type=Path, action="append", help="folder with text; may be repeated")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "preprocess-benchmark")
    parser.add_argument("--tokenizers", nargs="+", choices=TOKENIZERS, default=TOKENIZERS)
    parser.add_argument("--contestants", nargs="+", choices=names, default=names)
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--slow-workers", nargs="+", type=int, default=[2], help="for what takes minutes")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of what takes seconds")
    parser.add_argument("--peer-megabytes", type=float, default=60, help="of the corpus, for other tools")
    parser.add_argument("--beside", type=Path, help="another checkout of ours, to compare with")
    parser.add_argument(
        "--keep-cache", action="store_true", help="with what runs before learned about the tokenizers"
    )
    parser.add_argument("--megatron-0.19", type=Path, dest="megatron_0_19", help="its checkout")
    parser.add_argument("--megatron-main", type=Path, help="its checkout")
    parser.add_argument("--datatrove-python", type=Path, help="Python with datatrove")
    parser.add_argument("--dolma", type=Path, help="the dolma program")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds until a run counts as hung")
    parser.add_argument("--output", type=Path, help="a JSON file")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the contestant too
    # All contestants start from compiled Python, as they do where they are installed.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    device = machine(peer_versions(options))
    benchmark = Benchmark(options)
    benchmark.run()
    rows = sorted(benchmark.rows.values(), key=lambda row: (-row.workers, TOKENIZERS.index(row.tokenizer)))
    reached = list(goals(rows))
    print(f"{benchmark.corpus.bytes / 1e6:.0f} MB, {benchmark.corpus.documents} documents\n\n{table(rows)}\n")
    if options.beside:
        print(f"{beside(rows)}\n")
    print("\n".join(map(str, reached)))
    for what, word in benchmark.checked().items():
        print(f"{word}: {what}")
    if options.output:
        report: dict[str, Any] = {
            "device": device,
            "command": command(),
            "corpus": {**vars(benchmark.corpus), "path": benchmark.corpus.path.name},
            "compared_with_megatron_0.19": benchmark.checked(),
            "goals": [vars(goal) for goal in reached],
            "contestants": {name: each.what for name, each in contestants(options).items()},
            "rows": as_json(rows),
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
