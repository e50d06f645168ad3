import pytest

from tests.parallel.cases import Case
from tests.parallel.compare import tensors_apart
from tests.parallel.conftest import LAST

STOCK = "tests.training.stock.use_stock_model"


@pytest.mark.parametrize("layout", ["TP2", "PP2", "PP2xVPP2"])
def test_pre_is_stock_megatron_in_every_layout(run, layout):
    ours, stock = run(Case("pre", layout=layout)), run(Case("pre", layout=layout), (STOCK,))
    assert ours.curve == stock.curve
    assert max(tensors_apart(ours.weights(LAST), stock.weights(LAST), relative=False).values()) == 0


def test_peri_is_not(run):
    assert run(Case("peri", layout="TP2")).curve != run(Case("pre", layout="TP2")).curve
