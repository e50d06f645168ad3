"""lm-evaluation-harness on an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_periln.errors import UsageError

__all__ = ["PAPER_TASKS", "accuracies", "other_scores", "run_tasks"]

PAPER_TASKS = ("arc_easy", "hellaswag", "piqa", "social_iqa", "winogrande")
"""The five tasks of Kim et al., "Peri-LN", ICML 2025 (arXiv 2502.02732), table 1."""

_ACCURACIES = ("acc_norm,none", "acc,none")


def run_tasks(model: Path, tasks: Sequence[str], **options: Any) -> Mapping[str, Any]:
    """Run lm-evaluation-harness, and return its results by task.

    Parameters
    ----------
    model
        The folder of an exported model, with its tokenizer.
    tasks
        Names that lm-evaluation-harness knows, and folders: each stands for all tasks that it defines.
    **options
        For ``lm_eval.simple_evaluate``: ``device``, ``batch_size``, ``limit``, ``num_fewshot``.

    Raises
    ------
    UsageError
        If lm-evaluation-harness, the tokenizer, a task or its data is missing, or a folder defines none.
    """
    try:  # here, as it is optional, and takes seconds that the errors of the command line do without
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(
            f"lm-evaluation-harness is missing ({error}); pip install 'megatron-periln[evaluation]'"
        ) from error
    if not (model / "tokenizer_config.json").is_file():
        raise UsageError(f"--model {model} has no tokenizer; export it with --tokenizer FOLDER")
    folders = [task for task in tasks if Path(task).is_dir()]
    names = list(tasks)
    for folder in folders:
        own = TaskManager(include_path=[folder], include_defaults=False).all_subtasks
        if not own:
            raise UsageError(f"--tasks {folder}: no task in this folder, a YAML file with the key task")
        place = names.index(folder)
        names[place : place + 1] = own
    names = list(dict.fromkeys(names))
    manager = TaskManager(include_path=folders or None)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise UsageError(f"--tasks {', '.join(unknown)}: unknown to lm-evaluation-harness, and no folder")
    _check_data(names, manager)
    arguments = {"pretrained": str(model), "dtype": "float32", "trust_remote_code": False}
    results = lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=names, task_manager=manager, **options
    )
    return results["results"]


def _check_data(tasks: Sequence[str], manager: Any) -> None:
    """Load each task's data, so that all that is missing is named at once."""
    missing = {}
    for task in tasks:
        try:
            manager.load_task_or_group([task])
        except Exception as error:  # of datasets, of the hub's client, of the network
            missing[task] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    if missing:
        names = "; ".join(f"{task} ({reason})" for task, reason in missing.items())
        raise UsageError(
            f"the data of {len(missing)} tasks are neither in the cache nor to be had from the hub: {names}. "
            "Run this once where there is a network, then bring the folder that HF_HOME names here"
        )


def accuracies(results: Mapping[str, Any]) -> dict[str, float]:
    """Return each task's accuracy: length-normalized where the task reports that, as the paper does."""
    return {
        task: next(scores[name] for name in _ACCURACIES if name in scores)
        for task, scores in results.items()
        if any(name in scores for name in _ACCURACIES)
    }


def other_scores(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the scores of the tasks that report no accuracy, such as a perplexity."""
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in scores.items()
            if isinstance(value, float) and "_stderr" not in name
        }
        for task, scores in results.items()
        if not any(name in scores for name in _ACCURACIES)
    }
