"""Who speaks with whom, and over what."""

from argparse import Namespace

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.plan.costs.communication import traffic
from megatron_periln.plan.machine.gpus import GIB, GPUS, gpu_named
from megatron_periln.plan.machine.links import Layout


def layout(world_size=1024, node=8, **sizes):
    args = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "use_tp_pp_dp_mapping": False,
        "num_experts": None,
    }
    return Layout(Namespace(world_size=world_size, **(args | sizes)), node)


def test_groups_are_megatrons():
    """TP's neighbours, then CP's, then DP's; pipelines are furthest apart (initialize_model_parallel)."""
    job = layout(64, tensor_model_parallel_size=4, context_parallel_size=2, pipeline_model_parallel_size=2)
    assert job.group("TP", 5).ranks == (4, 5, 6, 7)
    assert job.group("CP", 5).ranks == (1, 5)
    assert job.group("DP", 0).ranks == (0, 4, 8, 12, 16, 20, 24, 28)
    assert job.group("PP", 5).ranks == (5, 37)
    assert job.group("embedding", 5).ranks == (5, 37)


def test_another_order_of_ranks_has_other_groups():
    job = layout(64, tensor_model_parallel_size=4, pipeline_model_parallel_size=2, use_tp_pp_dp_mapping=True)
    assert job.group("PP", 5).ranks == (1, 5)


@pytest.mark.parametrize("node, links", [(8, "NVLink"), (4, "both"), (1, "network")])
def test_links_follow_from_the_size_of_a_node(node, links):
    assert layout(64, node, tensor_model_parallel_size=8).group("TP", 3).links == links


def test_experts_have_groups_of_their_own():
    job = layout(64, num_experts=8, expert_model_parallel_size=8, tensor_model_parallel_size=2,
                 expert_tensor_parallel_size=1)  # fmt: skip
    assert job.group("EP", 9).ranks == tuple(range(8, 16))
    assert job.group("expert DP", 9).ranks == tuple(range(1, 64, 8))
    assert [group.kind for group in job.communicators(9)] == ["TP", "DP", "EP", "expert DP"]


def test_a_communicator_of_one_rank_is_none():
    assert layout(1).communicators(0) == []


def test_what_leaves_a_node():
    """Rings leave it once for all of the group's ranks there; all-to-alls from each rank."""
    gpu = GPUS["h100-80"]
    group = layout(64, 4, num_experts=8, expert_model_parallel_size=8).group("EP", 0)
    assert traffic(group, {"all-gather": 800}, 0, gpu).over_network == 200
    assert traffic(group, {"all-to-all": 700}, 0, gpu).over_network == 400
    assert traffic(group, {"send": 100}, 3, gpu).over_network == 100
    assert traffic(group, {"send": 100}, 2, gpu).over_network == 0
    assert traffic(group, {"send back": 100}, 4, gpu).over_network == 100
    inside = layout(64, 8, num_experts=8, expert_model_parallel_size=8).group("EP", 0)
    assert traffic(inside, {"all-to-all": 700}, 0, gpu).over_network == 0
    assert traffic(inside, {"all-to-all": 450}, 0, gpu).seconds == pytest.approx(1e-9)


def test_gpus_by_name_and_by_memory():
    assert gpu_named("H100-80").memory == round(79.10 * GIB)
    assert gpu_named("64").memory == 64 * GIB
    assert gpu_named("64").bf16 is None
    assert all(gpu.source for gpu in GPUS.values())


@pytest.mark.parametrize(
    "name, said", [("h100-08", "did you mean h100-80"), ("tpu", "unknown"), ("0", "no GPU")]
)
def test_an_unknown_gpu_is_one_line(name, said):
    with pytest.raises(UsageError, match=said):
        gpu_named(name)
