"""Evaluate a checkpoint or an exported model: its loss on a dataset, or lm-evaluation-harness."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_periln.command_line import (
    exit_code,
    parse_flags,
    prepare_for_megatron,
    quiet_megatron,
    run_command,
)
from megatron_periln.convert.model_folder import check_model_folder
from megatron_periln.data.indexed.format import check_indexed_dataset
from megatron_periln.errors import UsageError

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    group = parser.add_argument_group("model, one of")
    group.add_argument("--load", type=Path, help="a checkpoint: the folder that --save wrote")
    group.add_argument("--model", type=Path, help="an exported model's folder")
    parser.add_argument("--ckpt-step", type=int, help="which iteration of --load; default: the latest")
    group = parser.add_argument_group("loss on a dataset")
    group.add_argument("--data-path", help="an indexed dataset, without .bin or .idx")
    group.add_argument(
        "--seq-length", type=int, help="tokens in a window; default: the model's own, up to 4096"
    )
    group.add_argument("--windows", type=int, help="how many; default: all that the dataset fills")
    group.add_argument(
        "--batch-size", type=int, default=4, help="windows, or requests, at a time; default: 4"
    )
    group = parser.add_argument_group("lm-evaluation-harness, on an exported model")
    group.add_argument(
        "--tasks",
        nargs="+",
        help="names of tasks, and folders with tasks of your own, lm-eval's YAML files; "
        "paper: arc_easy, hellaswag, piqa, social_iqa and winogrande",
    )
    group.add_argument("--device", help="where; default: a GPU if there is one")
    group.add_argument("--limit", type=int, help="examples of each task; default: all")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and return the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    return exit_code(lambda: _evaluate(parse_flags(build_parser(), argv)))


def _evaluate(args: argparse.Namespace) -> None:
    if (args.load is None) == (args.model is None):
        raise UsageError("give --load CHECKPOINT or --model FOLDER, one of them")
    if (args.data_path is None) == (args.tasks is None):
        raise UsageError("give --data-path PREFIX for the loss, or --tasks for lm-evaluation-harness")
    if args.model is not None:
        check_model_folder(args.model)
    if args.tasks is not None:
        quiet_megatron()
        _run_tasks(args)
        return
    prepare_for_megatron()
    check_indexed_dataset(args.data_path, every_sequence=False)
    from megatron_periln import cpu  # imports torch, seconds that what was refused above need not take

    cpu.activate(hide_gpu=True)
    # After the line above, which decides what "cuda" is while Megatron is imported.
    from megatron_periln.convert.logits import checkpoint_model, transformers_model
    from megatron_periln.evaluation.loss import mean_loss, token_windows, window_length

    opened = (
        transformers_model(args.model) if args.load is None else checkpoint_model(args.load, args.ckpt_step)
    )
    with opened as model:
        length = window_length(args.seq_length, model.max_positions)
        windows = token_windows(args.data_path, length, model.vocab_size, args.windows)
        print(mean_loss(model.logits, windows, args.batch_size))


def _run_tasks(args: argparse.Namespace) -> None:
    if args.model is None:
        raise UsageError("--tasks needs an exported model; run tools/export_hf.py, then give --model")
    # lm-evaluation-harness takes seconds to import, and needs an extra.
    from megatron_periln.evaluation.tasks import PAPER_TASKS, accuracies, other_scores, run_tasks

    tasks = [task for name in args.tasks for task in (PAPER_TASKS if name == "paper" else [name])]
    options = {"device": args.device, "batch_size": args.batch_size, "limit": args.limit}
    results = run_tasks(args.model, tasks, **options)
    scores = accuracies(results)
    for task, accuracy in scores.items():
        print(f"{task}: {accuracy:.2%}")
    for task, found in other_scores(results).items():
        print(f"{task}: {', '.join(f'{name} {value:.6g}' for name, value in found.items())}")
    if len(scores) > 1:
        print(f"average: {sum(scores.values()) / len(scores):.2%}")


if __name__ == "__main__":
    run_command(main)
