"""What runtimes make of exports: logits beside Megatron's own, ids beside training's, or why there are none.

Trains a small model of each target with a tokenizer of each kind (runtimes/exports.py), then runs each
runtime in an environment of its own, with pinned versions. Results are written as they come; those that are
there are kept, but for --again. Prints the tables.

    python benchmarks/export_runtimes.py --work WORK --output benchmarks/results/export_runtimes.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import command, machine
from runtimes.environments import llama_cpp, python_of
from runtimes.table import KINDS, MIXTURES, TARGETS, TOKENIZED, tables
from tokenizers import Tokenizer

ARRAYS = {"logits", "ids", "continuations", "continued_texts"}
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCRIPTS = HERE / "runtimes"


@dataclass(frozen=True)
class Runtime:
    """A runtime.

    Parameters
    ----------
    name
        What the table calls it.
    script
        The one of benchmarks/runtimes that runs it, and its arguments.
    environment
        Whose Python runs it; none for this project's own.
    parts
        What is wanted of it.
    every_kind
        The same, of models beyond the first kind of tokenizer; its logits are the same there.
    ranks
        Processes of a job, by torchrun.
    """

    name: str
    script: tuple[str, ...]
    environment: str = ""
    parts: tuple[str, ...] = ("logits", "ids")
    every_kind: tuple[str, ...] = ("ids",)
    ranks: int = 1


NO_IDS: dict[str, Any] = {"parts": ("logits",), "every_kind": ()}
WHOLE: dict[str, Any] = {"parts": ("continued_texts", "ids"), "every_kind": ("continued_texts", "ids")}
RUNTIMES = (
    Runtime("transformers", ("in_transformers.py",)),
    Runtime("transformers 4", ("in_transformers.py",), "transformers-4"),
    Runtime("vLLM", ("in_vllm.py",), "vllm", parts=("logits", "ids", "continuations")),
    Runtime("llama.cpp", ("in_llama_cpp.py",), "llama.cpp", parts=("gguf",), every_kind=("gguf",)),
    Runtime("OpenVINO", ("in_openvino.py",), "openvino"),
    Runtime("OpenVINO beside transformers 4", ("in_openvino.py",), "openvino-transformers-4"),
    Runtime("ExecuTorch", ("in_executorch.py",), "executorch"),
    Runtime("torch.export", ("in_torch_export.py",), **NO_IDS),
    Runtime("ONNX", ("in_torch_export.py", "onnx"), "onnx", **NO_IDS),
    Runtime("onnxruntime-genai", ("in_onnxruntime_genai.py",), "onnx"),
    Runtime("mistral.rs", ("in_mistral_rs.py",), "mistral.rs", **WHOLE),
    Runtime("mlx-lm", ("in_mlx_lm.py",), "mlx"),
    Runtime("tensor parallel", ("in_tensor_parallel.py",), "fine-tuning", ranks=2, **NO_IDS),
    Runtime("PEFT", ("in_peft.py",), "fine-tuning", parts=("default_modules", "lora"), every_kind=()),
    Runtime("mergekit", ("in_mergekit.py",), "fine-tuning", parts=("merge",), every_kind=()),
)
MADE = {"PEFT": ("merged", "sharded", "resized"), "mergekit": ("merged",)}
"""The folders that fine-tuning leaves, which are imported."""


def answers(
    command: list[str], jobs: list[dict[str, Any]], log: Path, limit: float
) -> Iterator[dict[str, Any]]:
    """Yield what a script answers to each job; where its process ends at one, go on with the next."""
    left = list(jobs)
    while left:
        file = log.with_suffix(".jobs")
        file.write_text("".join(json.dumps(job) + "\n" for job in left))
        count = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        here = [str(file) if part == "JOBS" else part for part in command]
        with log.open("w+") as errors:
            limited = ["timeout", str(limit * len(left)), *here]
            with subprocess.Popen(
                limited, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("@@answer "):
                        count += 1
                        yield json.loads(line.removeprefix("@@answer "))
            errors.seek(0)
            lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
        left = left[count:]
        if left:
            last = next((line for line in reversed(lines) if "Error" in line or "panicked" in line), "")
            yield {
                "ended": f"its process ended with {process.returncode}: {last or (lines or [''])[-1]}"[:500]
            }
            left = left[1:]


def measured(found: dict[str, Any], reference: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what an answer is beside the reference: numbers in place of arrays."""
    kept = {name: value for name, value in found.items() if name not in ARRAYS}
    if "logits" in found:
        theirs = np.array(found["logits"])
        ours = np.array(reference["logits"])[: theirs.shape[0], : theirs.shape[1], : theirs.shape[2]]
        kept["largest"] = float(np.nanmax(np.abs(theirs - ours)))
        kept["positions"] = int(np.isfinite(theirs[..., 0]).sum())
        kept["deviation"] = float(ours.std())
    if "ids" in found:
        texts, right = reference["texts"], reference["ids"]
        wrong = [at for at, pair in enumerate(zip(found["ids"], right, strict=True)) if pair[0] != pair[1]]
        kept["texts"], kept["other_ids"] = len(texts), len(wrong)
        special = [at for at in wrong if any(token in texts[at] for token in reference["special"])]
        kept["other_ids_with_special_tokens"] = len(special)
        kept["first"] = [[texts[at][:60], found["ids"][at][:8], right[at][:8]] for at in wrong[:3]]
    if "continuations" in found:
        kept["continuations"] = same(found["continuations"], reference["continuations"])
    if "continued_texts" in found:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        right = [tokenizer.decode(ids, skip_special_tokens=True) for ids in reference["continuations"]]
        kept["continuations"] = same(
            [text.strip() for text in found["continued_texts"]], [text.strip() for text in right]
        )
    return kept


def same(found: list[Any], right: list[Any]) -> dict[str, Any]:
    """Return how many of the continuations are Megatron's, and of how many different ones."""
    equal = sum(left == other for left, other in zip(found, right, strict=True))
    different = [pair for pair in zip(found, right, strict=True) if pair[0] != pair[1]]
    return {"equal": equal, "of": len(right), "kinds": len(set(map(str, right))), "first": different[:1]}


class Results:
    """The results so far, in a file."""

    def __init__(self, path: Path, work: Path) -> None:
        self.path, self.work = path, work
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": {}}

    def add(self, runtime: str, target: str, kind: str, value: dict[str, Any]) -> None:
        """Keep one, and write the file."""
        self.data["cells"].setdefault(runtime, {}).setdefault(target, {})[kind] = value
        self.data |= {"machine": machine(), "command": command()}
        content = json.dumps(self.data, indent=1, ensure_ascii=True)
        self.path.write_text(content.replace(str(self.work), "WORK") + "\n")

    def has(self, runtime: str, target: str, kind: str) -> bool:
        """Return whether there is one."""
        return kind in self.data["cells"].get(runtime, {}).get(target, {})


def cells(runtime: Runtime, args: argparse.Namespace) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield the target and kind of each job of a runtime, and its parts."""
    for number, kind in enumerate(KINDS):
        parts = runtime.every_kind if number else runtime.parts
        if parts and kind in args.kinds:
            targets = [target for target in args.targets if not number or target in TOKENIZED]
            yield from ((target, kind, parts) for target in targets)


def run(runtime: Runtime, args: argparse.Namespace, results: Results) -> None:
    """Run the jobs of a runtime that have no result, or are asked for again."""
    wanted = [
        cell
        for cell in cells(runtime, args)
        if (args.again or not results.has(runtime.name, *cell[:2]))
        and (args.work / "models" / cell[1] / cell[0] / "reference.json").exists()
    ]
    if not wanted:
        return
    python = python_of(runtime.environment, args.work, args.uv)
    script, *options = runtime.script
    if script == "in_llama_cpp.py":
        options, python = [str(llama_cpp(args.work, args.uv)), python], sys.executable
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(runtime.ranks)]
    command = [python, *(launcher if runtime.ranks > 1 else []), str(SCRIPTS / script), "JOBS", *options]
    jobs, references, folders = [], [], []
    for target, kind, parts in wanted:
        place = args.work / "models" / kind / target
        reference = json.loads((place / "reference.json").read_text())
        work = args.work / "made" / runtime.name.replace(" ", "-") / kind / target
        shutil.rmtree(work, ignore_errors=True)
        asked = {name: reference[name] for name in ("tokens", "texts", "prompts")}
        asked |= {"greedy": len(reference["continuations"][0]), "parts": parts, "work": str(work)}
        jobs.append({**asked, "folder": str(place / "export")})
        references.append(reference)
        folders.append(place / "export")
    log = args.work / f"{runtime.name.replace(' ', '-')}-{os.getpid()}.log"
    found = answers(command, jobs, log, args.limit)
    for (target, kind, _), answer, reference, folder, job in zip(
        wanted, found, references, folders, jobs, strict=True
    ):
        value = measured(answer, reference, folder)
        results.add(runtime.name, target, kind, value)
        print(runtime.name, target, kind, json.dumps(value)[:400], flush=True)
        if runtime.name not in MADE:
            shutil.rmtree(job["work"], ignore_errors=True)
    if runtime.name in MADE:
        bring_back(runtime, args, results, [(target, kind) for target, kind, _ in wanted])


def bring_back(
    runtime: Runtime, args: argparse.Namespace, results: Results, made: list[tuple[str, str]]
) -> None:
    """Import the folders that fine-tuning left."""
    base = args.work / "made" / runtime.name
    folders = [(target, kind, name) for target, kind in made for name in MADE[runtime.name]]
    jobs = [
        {"folder": str(base / kind / target / name), "work": str(base / kind / target / f"{name}-imported")}
        | {"parts": ["imported"]}
        for target, kind, name in folders
    ]
    for job in jobs:
        shutil.rmtree(job["work"], ignore_errors=True)
    command = [sys.executable, str(SCRIPTS / "imports.py"), "JOBS"]
    found = answers(command, jobs, args.work / f"imports-{os.getpid()}.log", args.limit)
    for (target, kind, name), answer in zip(folders, found, strict=True):
        value = results.data["cells"][runtime.name][target][kind]
        value.setdefault("imported", {})[name] = answer.get("imported") or answer
        results.add(runtime.name, target, kind, value)
        print(runtime.name, target, name, json.dumps(answer)[:300], flush=True)


def main() -> None:
    """Run them and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where models and environments are made")
    parser.add_argument("--output", type=Path, required=True, help="JSON with all results")
    parser.add_argument("--uv", default=shutil.which("uv") or "uv", help="makes environments")
    names = [runtime.name for runtime in RUNTIMES]
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="some runtimes")
    parser.add_argument("--again", action="store_true", help="also those that have results")
    targets = (*TARGETS, *MIXTURES)
    parser.add_argument("--targets", nargs="+", choices=targets, default=targets)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of tokenizers")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a job")
    parser.add_argument("--no-models", action="store_true", help="take the models that are there")
    args = parser.parse_args()
    args.work = args.work.resolve()
    if not args.no_models:
        asked = ["--targets", *args.targets, "--kinds", *args.kinds]
        subprocess.run(
            [sys.executable, "-W", "ignore", SCRIPTS / "exports.py", args.work, *asked], check=True
        )
    results = Results(args.output, args.work)
    for runtime in RUNTIMES:
        if runtime.name in args.only:
            run(runtime, args, results)
    print(tables(results.data["cells"]))


if __name__ == "__main__":
    main()
