"""What attention sends under context parallelism, counted by hand from Transformer Engine's source."""

import pytest

from megatron_periln.plan.costs.communication import of_context
from tests.plan.hand_made import arguments

KEYS_VALUES = 2 * 512 * 2 * 1024 // 2 * 2  # of 512 tokens of 2048 x 2 samples: 4 of 8 heads of 128, in bf16
QUERIES = KEYS_VALUES // 2


def sent(layers=4, **changes):
    return of_context(arguments(context_parallel_size=4, **changes), layers)


def steps(layers=4):
    return layers * 128 // (2 * 2)  # microbatches of 2 on 2 data-parallel ranks


def test_a_ring_passes_keys_and_values_on():
    """Forward: three times; backward: they and their gradients three times each."""
    assert sent() == {"send": steps() * 3 * 3 * KEYS_VALUES}


def test_gathered_keys_and_values():
    """Gathered forward and backward, their gradients scattered."""
    found = sent(cp_comm_type=["all_gather"])
    assert found == {"all-gather": steps() * 2 * 3 * KEYS_VALUES, "reduce-scatter": steps() * 3 * KEYS_VALUES}


def test_exchanged_heads():
    """Three quarters of queries, keys, values and outputs, and of their gradients."""
    assert sent(cp_comm_type=["a2a"]) == {"all-to-all": steps() * 2 * (2 * QUERIES + KEYS_VALUES) * 3 // 4}


def test_grouped_queries_send_less():
    """Two groups of four queries: a quarter of the keys and values; TP can't split one group."""
    quarter = sent(group_query_attention=True, num_query_groups=2)["send"]
    assert 4 * quarter == sent()["send"]
    assert sent(group_query_attention=True, num_query_groups=1)["send"] == quarter


def test_recomputation_sends_again():
    assert sent(recompute_granularity="full")["send"] == sent()["send"] * 4 // 3
    assert sent(recompute_granularity="selective", recompute_modules=["layernorm"]) == sent()


@pytest.mark.parametrize("layers", [0, 8])
def test_layers_count(layers):
    assert sent(layers)["send"] == steps(layers) * 9 * KEYS_VALUES


def test_without_it_nothing_is_sent():
    assert of_context(arguments(), 4) == {}
