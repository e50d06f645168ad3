"""How each contestant is started."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from preprocess_peers.train import END_OF_TEXT, Tokenizer, with_joined_merges

__all__ = ["BEFORE", "COLD", "OURS", "RAW", "Contestant", "Job", "contestants"]

OURS = "ours"
COLD = "ours, cold"
BEFORE = "before"
RAW = "raw encoder"

_HERE = Path(__file__).parent
_TOOL = _HERE.parents[1] / "tools/preprocess_data.py"


@dataclass(frozen=True)
class Job:
    """What is to be encoded: ``corpus``, or the files in ``parts``, into ``output``."""

    tokenizer: Tokenizer
    workers: int
    corpus: Path
    parts: Path
    output: Path
    cache: Path


@dataclass(frozen=True)
class Contestant:
    """A way to tokenize a corpus.

    Parameters
    ----------
    name, what
        Its name in the table, and a line about it.
    command
        Its command for a job.
    environment
        What it has in its environment for a job.
    kinds
        The kinds of tokenizers it takes.
    slow
        It runs once, with its memory sampled in the same run.
    writes_megatron
        It writes a ``.bin`` and ``.idx``.
    reads_parts
        It reads the job's ``parts``.
    """

    name: str
    what: str
    command: Callable[[Job], list[str]]
    environment: Callable[[Job], Mapping[str, str]] = field(default=lambda job: {})
    kinds: frozenset[str] = frozenset({"hf", "sentencepiece", "tiktoken"})
    slow: bool = False
    writes_megatron: bool = True
    reads_parts: bool = False


def contestants(options: argparse.Namespace) -> dict[str, Contestant]:
    """Return the contestants that ``options`` make possible, by name."""
    found = [_megatron_0_19(options.megatron_0_19), *_ours(), _megatron_main(options.megatron_main), _raw()]
    if options.beside:
        found.append(_before(options.beside.resolve()))
    if options.datatrove_python:
        found.append(_datatrove(options.datatrove_python))
    if options.dolma:
        found.append(_dolma(options.dolma))
    return {contestant.name: contestant for contestant in found}


def _megatron_flags(job: Job) -> list[str]:
    files = ["--input", str(job.corpus), "--output-prefix", str(job.output / "data"), "--append-eod"]
    return [*files, *job.tokenizer.flags]


def _workers(job: Job) -> list[str]:
    return ["--workers", str(job.workers)]


def _ours() -> list[Contestant]:
    def command(job: Job) -> list[str]:
        return [sys.executable, str(_TOOL), *_megatron_flags(job), *_workers(job), "--overwrite"]

    def environment(job: Job) -> Mapping[str, str]:
        return {"XDG_CACHE_HOME": str(job.cache)}

    cold = "tools/preprocess_data.py, first use of the tokenizer on this machine (empty cache)"
    return [
        Contestant(COLD, cold, command, environment, slow=True),
        Contestant(OURS, "tools/preprocess_data.py", command, environment),
    ]


def _before(checkout: Path) -> Contestant:
    def command(job: Job) -> list[str]:
        tool = str(checkout / "tools/preprocess_data.py")
        return [sys.executable, tool, *_megatron_flags(job), *_workers(job), "--overwrite"]

    def environment(job: Job) -> Mapping[str, str]:
        return {"XDG_CACHE_HOME": f"{job.cache}-before", **_path(checkout)}

    return Contestant(BEFORE, "tools/preprocess_data.py of another checkout", command, environment)


def _megatron_0_19(checkout: Path | None) -> Contestant:
    name = "megatron-0.19"
    if checkout is None:
        script, what = _HERE / "pool_pipeline.py", "Megatron-LM 0.19's tool, its published pipeline rebuilt"
    else:
        script, what = checkout / "tools/preprocess_data.py", "Megatron-LM 0.19's tools/preprocess_data.py"

    def command(job: Job) -> list[str]:
        return [sys.executable, str(script), *_megatron_flags(job), *_workers(job)]

    return Contestant(name, what, command, lambda job: _path(checkout), slow=True)


def _megatron_main(checkout: Path | None) -> Contestant:
    name = "megatron-main"
    if checkout is None:
        script, what = _HERE / "gigatoken_pipeline.py", "Megatron-LM main's fast path, rebuilt"
    else:
        script = checkout / "tools/preprocess_data_fast.py"
        what = "Megatron-LM main's tools/preprocess_data_fast.py"

    def command(job: Job) -> list[str]:
        fast = ["--use-gigatoken"] if checkout else []
        return [sys.executable, str(script), *_megatron_flags(job), *fast]

    def environment(job: Job) -> Mapping[str, str]:
        return {"RAYON_NUM_THREADS": str(job.workers), **_path(checkout)}

    return Contestant(name, what, command, environment, kinds=frozenset({"hf"}))


def _path(checkout: Path | None) -> Mapping[str, str]:
    return {"PYTHONPATH": str(checkout)} if checkout else {}


def _raw() -> Contestant:
    def command(job: Job) -> list[str]:
        script = str(_HERE / "raw_encoder.py")
        files = ["--input", str(job.corpus), "--model", str(job.tokenizer.model)]
        result = ["--output", str(job.output / "result.json")]
        return [sys.executable, script, *files, *result, *_workers(job)]

    what = "gigatoken alone, texts parsed and in memory, a process a worker; only encoding is timed"
    return Contestant(RAW, what, command, writes_megatron=False)


def _datatrove(python: Path) -> Contestant:
    def command(job: Job) -> list[str]:
        files = ["--input", str(job.parts), "--output", str(job.output)]
        tokenizer = ["--tokenizer", str(job.tokenizer.model), "--eos-token", END_OF_TEXT]
        script = str(_HERE / "datatrove_pipeline.py")
        return [str(python), script, *files, *tokenizer, *_workers(job)]

    return Contestant(
        "datatrove",
        "datatrove's DocumentTokenizer, a task and a file a worker",
        command,
        lambda job: {"RAYON_NUM_THREADS": "1"},
        kinds=frozenset({"hf"}),
        slow=True,
        writes_megatron=False,
        reads_parts=True,
    )


def _dolma(program: Path) -> Contestant:
    def command(job: Job) -> list[str]:
        tokenizer = ["--tokenizer.name_or_path", str(with_joined_merges(job.tokenizer))]
        # The end of the text is the first entry of the tokenizers that this benchmark trains.
        ids = ["--tokenizer.eos_token_id", "0", "--tokenizer.pad_token_id", "0"]
        dtype = ["--dtype", "uint16" if job.tokenizer.vocab_size < 2**16 else "uint32"]
        files = ["--documents", f"{job.parts}/*.jsonl", "--destination", str(job.output)]
        processes = ["--processes", str(job.workers)]
        return [str(program), "tokens", *files, *processes, *tokenizer, *ids, *dtype]

    return Contestant(
        "dolma",
        "Ai2's `dolma tokens`, a process and a file a worker",
        command,
        lambda job: {"RAYON_NUM_THREADS": "1"},
        kinds=frozenset({"hf"}),
        slow=True,
        writes_megatron=False,
        reads_parts=True,
    )
