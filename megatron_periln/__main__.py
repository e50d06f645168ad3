"""``megatron-periln COMMAND``: every command of the package under one name on the ``PATH``.

Each command is a module that ``python -m`` and torchrun's ``-m`` run too, and is run here in the same way.
"""

from __future__ import annotations

import difflib
import runpy
import sys

from megatron_periln.command_line import exit_code
from megatron_periln.errors import UsageError
from megatron_periln.version import __version__

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "pretrain": (
        "megatron_periln.pretrain",
        "train a GPT with a norm placement (with torchrun: its -m)",
    ),
    "launch": ("megatron_periln.launch", "torchrun, without its own traceback after an error of a rank"),
    "preprocess-data": ("megatron_periln.tools.preprocess_data", "tokenize text into indexed datasets"),
    "merge-datasets": ("megatron_periln.tools.merge_datasets", "merge indexed datasets"),
    "inspect-dataset": ("megatron_periln.tools.inspect_dataset", "say what a dataset holds, and verify it"),
    "train-tokenizer": ("megatron_periln.tools.train_tokenizer", "train a tokenizer on text"),
    "export-hf": ("megatron_periln.tools.export_hf", "export a checkpoint to a model of transformers"),
    "export-gguf": (
        "megatron_periln.tools.export_gguf",
        "write an exported model as a GGUF file for llama.cpp",
    ),
    "import-hf": ("megatron_periln.tools.import_hf", "import a model of transformers as a checkpoint"),
    "warm-start": ("megatron_periln.tools.warm_start", "make a Peri-LN checkpoint of a Pre-LN one"),
    "evaluate": ("megatron_periln.tools.evaluate", "measure a model's loss, or run lm-evaluation-harness"),
    "report": ("megatron_periln.tools.report", "compare monitored runs on one page"),
    "study": ("megatron_periln.studies", "run a declared study, and write its table"),
    "plan": ("megatron_periln.plan", "tell what a run will take before it is launched, and whether it fits"),
    "doctor": ("megatron_periln.doctor", "tell whether a node is fit to train"),
}
"""The module and the summary of each command; those of Megatron-LM's tools bear the names of their files."""


def main() -> None:
    """Run the command that ``sys.argv`` names, as ``python -m`` runs its module."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(__version__)
    elif command := COMMANDS.get(name.replace("_", "-")):
        sys.argv = [f"megatron-periln {name}", *sys.argv[2:]]  # argparse names the program after it
        runpy.run_module(command[0], run_name="__main__")
    else:
        sys.exit(exit_code(lambda: _refuse(name)))


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: megatron-periln COMMAND [FLAG ...]",
            "",
            *(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()),
            "",
            "COMMAND --help lists its flags; --version prints the version.",
        ]
    )


def _refuse(name: str) -> None:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    raise UsageError(
        f"unknown command {name}"
        + "".join(f" (did you mean {each}?)" for each in near)
        + "; --help lists them"
    )


if __name__ == "__main__":
    main()
