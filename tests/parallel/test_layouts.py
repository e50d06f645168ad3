import os
from pathlib import Path

import pytest

from tests.parallel.cases import CASES, MORE_CASES
from tests.parallel.compare import bounds, distance
from tests.parallel.conftest import FIRST, LAST


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_gives_the_numbers_of_one_process(run, case, report):
    apart = distance(run(case), run(case.one_process), FIRST, LAST)
    report[case] = apart
    assert not apart.exceeds(bounds(case)), apart


# Where they are not asked for, none of the processes of `make test` need collect and skip hundreds of them.
@pytest.mark.parametrize("case", MORE_CASES if "MEGATRON_PERILN_TEST_ALL" in os.environ else [], ids=str)
def test_every_other_layout_gives_the_numbers_of_one_process(run, case):
    apart = distance(run(case), run(case.one_process), FIRST, LAST)
    assert not apart.exceeds(bounds(case)), apart


def test_the_documentation_lists_every_case():
    rows = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text()
    for case in CASES:
        model = ", ".join(filter(None, (case.architecture, case.variant)))
        layout = ", ".join(filter(None, (case.layout, case.options)))
        assert f"| {case.placement} | {model} | {layout} |" in rows
