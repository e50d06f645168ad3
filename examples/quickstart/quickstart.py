"""Pretrain a small Peri-LN GPT from raw text: data, tokenizer, training, resumption, summary.

The text is what every machine with Python has: the sources of its standard library.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = Path("examples/quickstart/model.flags")
VOCABULARY = 4096
RESUME_AFTER = 180

ITERATION = re.compile(
    r"iteration +(\d+)/ *(\d+) .*elapsed time per iteration \(ms\): ([\d.]+) .*"
    r"global batch size: +(\d+) .*lm loss: ([\dE.+-]+)"
)
VALIDATION = re.compile(
    r"validation loss at iteration (\d+) (?:on validation set )?\| lm loss value: ([\dE.+-]+)"
)


def say(text: str) -> None:
    """Print a step of the tour."""
    print(f"\n>> {text}", flush=True)


def run(command: list[str], log: Path) -> None:
    """Run a command with its output in ``log``; exit with its last lines if it fails."""
    print("   $ " + shlex.join(command), flush=True)
    with log.open("w") as output:
        status = subprocess.call(command, stdout=output, stderr=subprocess.STDOUT)
    if status:
        fail(command, log)


def fail(command: list[str], log: Path) -> None:
    """Exit, showing the end of the log."""
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    sys.exit(f"{tail}\n\n{shlex.join(command[:4])} ... failed; the whole log is {log}")


def corpus(path: Path) -> None:
    """Write the standard library's sources as JSON Lines, one document a file."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    sources = sorted(p for p in library.rglob("*.py") if not skipped & set(p.relative_to(library).parts))
    with path.open("w") as output:
        for source in sources:
            output.write(json.dumps({"text": source.read_text(errors="replace")}) + "\n")
    print(f"   {len(sources)} documents, {path.stat().st_size / 1e6:.1f} MB: {path}")


def tokenizer(text: Path, prefix: Path) -> None:
    """Train a byte-fallback BPE tokenizer that keeps white space."""
    import sentencepiece

    lines = (
        line for document in text.open() for line in json.loads(document)["text"].splitlines() if line.strip()
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(prefix),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        input_sentence_size=60_000,
        minloglevel=2,
    )
    print(f"   {VOCABULARY} tokens: {prefix}.model")


def unigram_entropy(prefix: str) -> float:
    """Return the entropy of the tokens' frequencies in nats: the loss of knowing nothing but those."""
    import numpy as np

    counts = np.bincount(np.fromfile(f"{prefix}.bin", dtype=np.uint16))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def data(folder: Path) -> str:
    """Make the indexed dataset in ``folder`` unless it is there; return its prefix."""
    prefix = folder / "stdlib"
    dataset = f"{prefix}_text_document"
    if Path(f"{dataset}.idx").exists():
        say(f"Using the data that is there: {dataset}.bin, .idx")
        return dataset
    folder.mkdir(parents=True, exist_ok=True)
    say("Gathering text: the sources of Python's standard library")
    corpus(folder / "stdlib.jsonl")
    say("Training a SentencePiece tokenizer on it")
    tokenizer(folder / "stdlib.jsonl", folder / "tokenizer")
    say("Tokenizing it into Megatron's indexed dataset")
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(folder / "stdlib.jsonl")]
    command += ["--output-prefix", str(prefix), "--append-eod", "--overwrite"]
    command += ["--tokenizer-type", "SentencePieceTokenizer"]
    command += ["--tokenizer-model", str(folder / "tokenizer.model")]
    run(command, folder / "preprocess.log")
    return dataset


def device_flags() -> tuple[int, list[str]]:
    """Return the number of ranks, and the flags, for the machine at hand."""
    import importlib.util

    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        return 2, ["--device", "cpu"]
    flags = ["--bf16"]
    if importlib.util.find_spec("transformer_engine") is None:
        flags += ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"]
        flags += ["--no-masked-softmax-fusion", "--no-gradient-accumulation-fusion"]
    return min(gpus, 2), flags


@dataclass
class Progress:
    """What the training log has told so far."""

    first_loss: float = math.nan
    last_loss: float = math.nan
    validation: float = math.nan
    iterations: int = 0
    tokens_per_second: float = math.nan

    def read(self, line: str, sequence_length: int) -> str | None:
        """Take in a line of the log; return what is worth showing of it."""
        if match := VALIDATION.search(line):
            self.validation = float(match[2])
            return f"   validation loss after {match[1]} iterations: {self.validation:.3f}"
        if match := ITERATION.search(line):
            self.iterations, total, batch = int(match[1]), int(match[2]), int(match[4])
            self.last_loss = float(match[5])
            if math.isnan(self.first_loss):
                self.first_loss = self.last_loss
            self.tokens_per_second = batch * sequence_length / (float(match[3]) / 1e3)
            bar = "#" * round(30 * self.iterations / total)
            return (
                f"   [{bar:<30}] {self.iterations}/{total}  loss {self.last_loss:.3f}  "
                f"{self.tokens_per_second:,.0f} tokens/s"
            )
        return None


def follow(command: list[str], log: Path) -> Iterator[str]:
    """Run a command; write its output to ``log`` and yield its lines. Exit if it fails."""
    print("   $ " + shlex.join(command), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with (
        log.open("a") as output,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            output.write(line)
            output.flush()
            yield line
    if process.returncode:
        fail(command, log)


def train(arguments: list[str], ranks: int, log: Path, progress: Progress) -> None:
    """Run one training job, showing its progress on one line."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--nproc-per-node", str(ranks), "-m", "megatron_periln.pretrain", *arguments]
    inline = sys.stdout.isatty()
    for line in follow(command, log):
        shown = progress.read(line, sequence_length=256)
        if shown:
            print(shown, end="\r" if inline and "[" in shown else "\n", flush=True)
    if inline:
        print()


def main() -> None:
    """Take the tour."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--norm-placement", default="peri", choices=("pre", "post", "peri", "output"))
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/quickstart"),
        help="where everything goes, from the repository's root",
    )
    options = parser.parse_args()

    os.chdir(ROOT)
    started = time.time()
    dataset = data(options.folder / "data")
    entropy = unigram_entropy(dataset)
    ranks, flags = device_flags()
    run_folder = options.folder / f"{options.norm_placement}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_folder.mkdir(parents=True)
    checkpoints, log = run_folder / "checkpoints", run_folder / "train.log"
    arguments = [f"@{FLAGS}", *flags, "--norm-placement", options.norm_placement]
    arguments += ["--tensor-model-parallel-size", str(ranks), "--data-path", dataset]
    arguments += ["--tokenizer-type", "SentencePieceTokenizer"]
    arguments += ["--tokenizer-model", str(options.folder / "data" / "tokenizer.model")]
    arguments += ["--data-cache-path", str(options.folder / "data" / "cache")]
    arguments += ["--save", str(checkpoints), "--tensorboard-dir", str(run_folder / "tensorboard")]

    device = "the CPU" if "--device" in flags else "the GPU"
    say(f"Pretraining on {device}: norm placement {options.norm_placement}, tensor parallel {ranks}")
    progress = Progress()
    train([*arguments, "--exit-interval", str(RESUME_AFTER)], ranks, log, progress)
    stopped = progress.iterations
    say(f"Stopped after {stopped} iterations; resuming from the checkpoint")
    train([*arguments, "--load", str(checkpoints)], ranks, log, progress)

    say(f"Done in {time.time() - started:.0f} s")
    losses = f"{progress.first_loss:.3f} -> {progress.last_loss:.3f}"
    print(
        f"""   training loss    {losses} in {progress.iterations} iterations
   validation loss  {progress.validation:.3f}; unigram entropy of the tokens: {entropy:.3f}
   speed            {progress.tokens_per_second:,.0f} tokens/s
   resumed          at iteration {stopped}

   checkpoints      {run_folder}/checkpoints
   TensorBoard      tensorboard --logdir {run_folder}/tensorboard
   log              {run_folder}/train.log

   Try next: make quickstart PLACEMENT=pre      (or post, output), and compare in TensorBoard
             @examples/quickstart/model.flags   holds the flags; add yours after it"""
    )


if __name__ == "__main__":
    main()
