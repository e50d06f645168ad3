import pytest

from tests.parallel.cases import Case
from tests.parallel.compare import FP32, distance
from tests.parallel.conftest import FIRST, LAST


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        ("untag_output_norms", Case("peri", layout="TP2+SP")),
        ("untag_embedding_norm", Case("peri", layout="TP2+SP")),
        ("norm_before_the_bias", Case("peri", "biased", "PP2")),
        ("embedding_norm_on_the_second_stage", Case("peri", "biased", "PP2")),
        ("skip_the_embedding_norms_gradient", Case("peri", "biased", "PP2")),
        # Fails once upstream's gradients are right without our help.
        ("leave_latent_attention_as_it_is", Case("peri", "mla", "TP2")),
        ("leave_latent_attention_as_it_is", Case("peri", "mla", "TP2+SP")),
    ],
    ids=str,
)
def test_a_fault_is_noticed_in_the_gradients(run, fault, case):
    apart = distance(run(case, (f"tests.parallel.faults.{fault}",)), run(case.one_process), FIRST, LAST)
    assert apart.gradients > 100 * FP32["gradients"], apart
