"""The committed plans of published layouts: each has flags and a source; those that were trained fit."""

import json
import re
from pathlib import Path

from megatron_periln.flag_files import expand

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = json.loads((BENCHMARKS / "results" / "plan_published.json").read_text())["results"]


def test_all_are_there_with_a_source():
    files = {path.stem: path for path in (BENCHMARKS / "published").glob("*.flags") if path.stem != "common"}
    assert files.keys() == {each["name"] for each in RESULTS} and len(files) >= 6
    for path in files.values():
        assert re.search(r"\b[\w-]+/[\w.-]+, .+ at [0-9a-f]{7}", path.read_text()), path
        assert "--num-layers" in expand([f"@{path}"])


def test_the_plan_says_that_they_fit():
    trained = [each for each in RESULTS if each["trained"]]
    assert len(trained) >= 6
    for each in trained:
        assert each["fits"], each
        assert 0 < each["gib"] < each["of_gib"]


def test_their_sizes_are_their_names():
    """To the digits that the names have."""
    sizes = {each["name"]: each["parameters"] / 1e9 for each in RESULTS}
    for name, billions in {
        "llama3-70b-fp8": 70.6,
        "llama3.1-405b-fp8": 405.9,
        "mixtral-8x22b": 140.6,
    }.items():
        assert abs(sizes[name] / billions - 1) < 0.005
