import pytest

from tests.parallel.cases import CASES
from tests.parallel.compare import BF16, FP32, distance
from tests.parallel.conftest import FIRST, LAST


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_gives_the_numbers_of_one_process(run, case, record_property):
    apart = distance(run(case), run(case.one_process), FIRST, LAST)
    record_property("distance", apart)
    assert not apart.exceeds(BF16 if case.variant == "bf16" else FP32), apart
