"""The tables of runtimes in docs/export.md are the results; those are counted and told as they should be."""

import copy
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = (BENCHMARKS.parent / "docs" / "export.md").read_text()
RESULTS = json.loads((BENCHMARKS / "results" / "export_runtimes.json").read_text())["cells"]


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import export_runtimes

        yield export_runtimes


def test_the_page_has_the_tables(benchmark):
    assert benchmark.tables(RESULTS) in PAGE


def test_another_result_is_another_table(benchmark):
    """The negative control, for both tables."""
    for name, value in {"largest": 0.5, "other_ids": 7}.items():
        changed = copy.deepcopy(RESULTS)
        changed["transformers"]["glm4"]["HuggingFaceTokenizer"][name] = value
        assert benchmark.tables(changed) not in PAGE


def test_what_is_measured(benchmark, tmp_path):
    reference = {"logits": [[[0.0, 1.0], [2.0, 3.0]]], "texts": ["a", "<s>", "b"], "ids": [[0], [1], [2, 3]]}
    reference |= {"special": ["<s>"], "continuations": [[1, 2], [3, 4]]}
    found = {"logits": [[[0.0, 1.25], [2.0, float("nan")]]], "ids": [[0], [4], [2, 3]]}
    found |= {"continuations": [[1, 2], [3, 5]]}
    kept = benchmark.measured(found, reference, tmp_path)
    assert (kept["largest"], kept["texts"], kept["other_ids"]) == (0.25, 3, 1)
    assert kept["other_ids_with_special_tokens"] == 1 and kept["first"] == [["<s>", [4], [1]]]
    assert kept["continuations"]["equal"] == 1
    right = {name: reference[name] for name in found}
    kept = benchmark.measured(right, reference, tmp_path)
    assert (kept["largest"], kept["other_ids"], kept["continuations"]["equal"]) == (0, 0, 2)


def test_a_process_that_ends_at_a_job_costs_that_job_alone(benchmark, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "for line in open(sys.argv[1]):\n"
        "    if json.loads(line)['number'] == 1:\n"
        "        raise SystemExit('ThisError: no such model')\n"
        "    print('@@answer ' + line.strip(), flush=True)\n"
    )
    jobs = [{"number": number} for number in range(3)]
    command = [sys.executable, "-S", str(script), "JOBS"]
    found = list(benchmark.answers(command, jobs, tmp_path / "log", 60))
    assert [found[0], found[2]] == [jobs[0], jobs[2]]
    assert found[1] == {"ended": "its process ended with 1: ThisError: no such model"}
