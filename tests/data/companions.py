"""Small datasets, their sidecar, and the companions of preprocessing run in this process."""

from __future__ import annotations

import dataclasses
import importlib
import io
from contextlib import redirect_stderr, redirect_stdout
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_periln.data.indexed.sidecar import Sidecar

TOOLS = Path(__file__).parents[2] / "tools"
WITHOUT_MEGATRON = (
    "import runpy, sys; sys.argv = sys.argv[1:]\n"
    "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    "except SystemExit as end: assert end.code == 0\n"
    "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
)
"""For ``python -c``: run the tool that follows, and check what it imported."""

SIDECAR = Sidecar(
    documents=3,
    sequences=2,
    tokens=6,
    dtype="uint16",
    bytes_read=40,
    skipped={"malformed JSON": 2},
    tokenizer={
        "type": "SentencePieceTokenizer",
        "digest": "0f",
        "vocab_size": 400,
        "eod": 2,
        "encoder": "megatron",
    },
    append_eod=True,
    json_key="text",
    inputs=[{"path": "/corpus/naïve \udcff.jsonl", "bytes": 40}],
    sha256={"bin": "ab", "idx": "cd"},
    versions={"megatron-periln": "0.1.0"},
    command=["tools/preprocess_data.py", "--input", "naïve.jsonl"],
    created="2026-10-20T12:00:00+00:00",
)

Documents = list[list[list[int]]]
SMALL: Documents = [[[1, 2, 3], [4]], [], [[5, 6]]]


def build(prefix: Path, documents: Documents, dtype: type = np.uint16, modes: bool = False) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=modes)
    for document in documents:
        lengths = [len(sequence) for sequence in document]
        builder.add_document(
            list(chain.from_iterable(document)), lengths, [n % 3 for n in range(len(lengths))]
        )
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def random_documents(seed: int) -> Documents:
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(1, 250, rng.integers(0, 30)).tolist() for _ in range(rng.integers(0, 4))]
        for _ in range(rng.integers(20, 60))
    ] + [[[1]], []]


def megatron_merge(prefixes: list[str], output: Path, dtype: type, modes: bool = False) -> None:
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=dtype, multimodal=modes)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(f"{output}.idx")


def content(prefix: str | Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def write_sidecar(prefix: str, **changes: Any) -> Sidecar:
    sidecar = dataclasses.replace(SIDECAR, **changes)
    sidecar.write(f"{prefix}.json")
    return sidecar


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Result(NamedTuple):
    """How a tool ended: its exit code and what it wrote."""

    code: int
    stdout: str
    stderr: str


def load_tool(name: str) -> ModuleType:
    return importlib.import_module(f"megatron_periln.tools.{name}")


def run_tool(name: str, *argv: object) -> Result:
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = load_tool(name).main([str(argument) for argument in argv])
    return Result(code, stdout.getvalue(), stderr.getvalue())


def refusal(name: str, folder: Path, *argv: object) -> str:
    """Return the one line of a tool's error, nothing in ``folder`` having changed."""
    before = snapshot(folder)
    code, stdout, stderr = run_tool(name, *argv)
    assert (code, stdout) == (1, ""), stderr
    lines = [line for line in stderr.splitlines() if not line.startswith("Copied ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert snapshot(folder) == before
    return lines[0]
