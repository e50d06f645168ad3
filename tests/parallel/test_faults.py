import pytest

from tests.parallel.cases import Case
from tests.parallel.compare import FP32, tensors_apart
from tests.parallel.conftest import FIRST


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        ("untag_output_norms", Case("peri", layout="TP2+SP")),
        ("untag_embedding_norm", Case("peri", layout="TP2+SP")),
        ("norm_before_the_bias", Case("peri", "biased", "PP2")),
        ("embedding_norm_on_the_second_stage", Case("peri", "biased", "PP2")),
        ("skip_the_embedding_norms_gradient", Case("peri", "biased", "PP2")),
    ],
    ids=str,
)
def test_a_fault_is_noticed_in_the_gradients(run, fault, case):
    check_that_the_gradients_tell(run, fault, case)


@pytest.mark.parametrize("layout", ["TP2", "TP2+SP"])
def test_upstream_still_has_wrong_gradients_in_latent_attention(run, layout):
    check_that_the_gradients_tell(run, "leave_latent_attention_as_it_is", Case("peri", "mla", layout))


def test_upstream_still_has_wrong_gradients_in_gated_delta_nets(run):
    check_that_the_gradients_tell(run, "leave_delta_nets_as_they_are", Case("peri", "states", "TP2"))


def check_that_the_gradients_tell(run, fault, case):
    wrong = run(case, (f"tests.parallel.faults.{fault}",), FIRST)
    apart = tensors_apart(wrong.gradients, run(case.one_process).gradients, relative=True)
    assert max(apart.values()) > 100 * FP32["gradients"], apart
