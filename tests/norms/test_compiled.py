"""What torch.compile makes of the norms is the same in both passes of recomputation, dropout's mask too."""

import pytest


@pytest.fixture(scope="module")
def found(compiled_on_the_cpu):
    if "both passes" not in compiled_on_the_cpu:
        pytest.skip("torch.compile needs a compiler on the CPU")
    return compiled_on_the_cpu["both passes"]


def test_recomputation_runs_the_graph_that_it_differentiates_and_keeps_none_without_gradients(found):
    assert found["graphs"] == {"made": 1, "kept": False}
    assert found["graphs_plainly"]["made"] > 1


def test_what_torch_compile_gives_up_on_is_given_up_in_both_passes(found):
    """Compiled in one pass only, dropout draws another mask: no rounding is that far off."""
    assert found["limited"] == {"error": 0.0, "same_mask": True}
    assert found["limited_plainly"]["error"] > 0.1
    assert not found["limited_plainly"]["same_mask"]
