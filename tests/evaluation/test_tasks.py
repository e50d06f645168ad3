"""lm-evaluation-harness is asked the right question, and what is missing is named at once."""

import sys
import types
from pathlib import Path

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.evaluation.tasks import PAPER_TASKS, accuracies, other_scores, run_tasks

SCORES = {
    "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_norm,none": 0.45, "acc_stderr,none": 0.01},
    "social_iqa": {"alias": "social_iqa", "acc,none": 0.4},
    "wikitext": {"alias": "wikitext", "word_perplexity,none": 20.0},
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def harness(monkeypatch):
    """Stands in for lm_eval; ``calls`` has what it was asked, ``offline`` the tasks without data."""
    calls, offline = [], set()

    class TaskManager:
        def __init__(self, include_path=None, include_defaults=True):
            files = [file for folder in include_path or [] for file in sorted(Path(folder).glob("*.yaml"))]
            self.all_subtasks = [file.read_text().removeprefix("task: ").strip() for file in files]
            self.all_tasks = [*self.all_subtasks, *((*PAPER_TASKS, "wikitext") if include_defaults else ())]

        def load_task_or_group(self, tasks):
            if offline & set(tasks):
                raise ConnectionError("couldn't reach\n the hub")

    def simple_evaluate(**options):
        calls.append(options)
        return {"results": SCORES}

    package, tasks = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.tasks")
    package.simple_evaluate, tasks.TaskManager = simple_evaluate, TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return types.SimpleNamespace(calls=calls, offline=offline)


def test_the_model_is_run_without_code_of_its_own(model, harness):
    assert run_tasks(model, PAPER_TASKS, limit=3) == SCORES
    (asked,) = harness.calls
    assert asked["tasks"] == ["arc_easy", "hellaswag", "piqa", "social_iqa", "winogrande"]
    assert asked["model"] == "hf"
    assert asked["model_args"] == {"pretrained": str(model), "dtype": "float32", "trust_remote_code": False}
    assert asked["limit"] == 3


def test_accuracy_is_normalized_by_length_where_there_is_such_a_score():
    assert accuracies(SCORES) == {"arc_easy": 0.45, "social_iqa": 0.4}


def test_all_missing_data_are_named_before_anything_runs(model, harness):
    harness.offline.update({"piqa", "winogrande"})
    with pytest.raises(
        UsageError, match=r"the data of 2 tasks .*piqa \(ConnectionError.*winogrande .*HF_HOME"
    ):
        run_tasks(model, PAPER_TASKS)
    assert harness.calls == []


def test_unknown_tasks_are_named(model, harness):
    with pytest.raises(UsageError, match="--tasks arc, pica: unknown to lm-evaluation-harness"):
        run_tasks(model, ["pica", "piqa", "arc"])


def test_a_folder_stands_for_its_tasks(model, harness, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    with pytest.raises(UsageError, match=f"--tasks {folder}: no task in this folder, a YAML file"):
        run_tasks(model, [str(folder), "piqa"])
    for name in ("ours", "theirs"):
        (folder / f"{name}.yaml").write_text(f"task: {name}")
    run_tasks(model, ["piqa", str(folder), "theirs"])
    (asked,) = harness.calls
    assert asked["tasks"] == ["piqa", "ours", "theirs"]
    assert {"ours", "theirs", "piqa"} <= set(asked["task_manager"].all_tasks)
    with pytest.raises(UsageError, match="--tasks theirs: unknown to lm-evaluation-harness, and no folder"):
        run_tasks(model, ["theirs"])


def test_scores_of_tasks_without_accuracy():
    assert other_scores(SCORES) == {"wikitext": {"word_perplexity": 20.0}}


def test_a_model_without_tokenizer_is_refused(tmp_path, harness):
    with pytest.raises(UsageError, match="has no tokenizer; export it with --tokenizer FOLDER"):
        run_tasks(tmp_path, ["piqa"])


def test_a_missing_harness_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'megatron-periln\[evaluation\]'"):
        run_tasks(model, ["piqa"])
