"""What the plan says that ranks send, against what they sent: counted in real jobs over gloo."""

import functools
import json
import re
import shlex
from argparse import Namespace
from collections import defaultdict

import pytest
import torch

from megatron_periln.plan.costs.collectives import Sent
from megatron_periln.plan.costs.communication import (
    Buffers,
    in_model,
    of_embedding,
    of_gradients,
    of_pipeline,
)
from megatron_periln.plan.ranks import plan_ranks
from tests.parallel.cases import ARCHITECTURES
from tests.parallel.jobs import COMMON

COUNTING = "tests.parallel.counting.count_the_second_step"
SHORT = (
    "--mock-data --train-iters 2 --lr-decay-iters 2 --lr-warmup-iters 0 --save-interval 100 --vocab-size 255"
)

LAYOUTS = {
    "pipeline": f"""{ARCHITECTURES["biased"]} --bf16 --tensor-model-parallel-size 2 --sequence-parallel
        --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2""",
    "experts": f"""{ARCHITECTURES["moe"]} --use-distributed-optimizer --context-parallel-size 2
        --expert-model-parallel-size 2""",
}


@pytest.fixture(scope="module")
def counted(jobs):
    @functools.cache
    def run(name):
        finished = jobs.run(f"traffic-{name}", f"{LAYOUTS[name]} {SHORT}", 4, changes=[COUNTING])
        lines = [json.loads(line) for line in re.findall("^counted (.*)", finished.log, re.MULTILINE)]
        return sorted(lines, key=lambda line: line["rank"])

    return run


def arguments(line, **changes):
    dtype = getattr(torch, line["params_dtype"])
    return Namespace(**{**line["args"], "params_dtype": dtype, **changes})


def by_group(line):
    found = defaultdict(dict)
    for group, _, collective, count in line["sent"]:
        found[group][collective] = count
    return found


def sent_to_stages(line):
    """Megatron sends from every other stage in the default group (p2p_communication._p2p_ops)."""
    return sum(count for _, _, collective, count in line["sent"] if collective == "send")


def test_stages_send_what_the_plan_says(counted):
    lines = counted("pipeline")
    assert len(lines) == 4
    for line in lines:
        args, stage = arguments(line), line["rank"] // 2
        assert sum(of_pipeline(args, stage).values()) == sent_to_stages(line)
        assert of_embedding(args, stage) == by_group(line)["EMBEDDING_GROUP"]


def test_a_plan_that_forgets_sequence_parallelism_is_found(counted):
    """The negative control: it would send whole sequences."""
    line = counted("pipeline")[0]
    planned = of_pipeline(arguments(line, sequence_parallel=False), 0)
    assert sum(planned.values()) == 2 * sent_to_stages(line)


def test_tensor_parallelism_gathers_and_scatters_by_the_layer(counted):
    """Of each sublayer the input, in backward again, and the output's gradient; its output, the input's.

    Learned positions are added before the sequence is split: the embedding's output is reduced as a whole.
    """
    line = counted("pipeline")[0]
    args = arguments(line)
    tokens = args.seq_length * args.micro_batch_size
    ring = tokens * args.hidden_size * args.params_dtype.itemsize // 2  # (n - 1) / n of it
    microbatches, layers = 2, 2
    found = in_model({Sent(*key): count for *key, count in line["sent"]})["TP"]
    assert found["all-gather"] == ring * microbatches * (layers * 2 * 3 + 1)  # and the embedding's gradient
    assert found["reduce-scatter"] == ring * microbatches * layers * 2 * 2


def test_data_parallel_ranks_send_their_buffers(counted):
    """Dense ones and experts', in groups of their own; both optimizers gather all of both."""
    for line in counted("experts"):
        args, sent = arguments(line), by_group(line)
        sizes = {"DATA_PARALLEL_GROUP_WITH_CP": 4, "EXPERT_DATA_PARALLEL_GROUP": 2}
        assert {group for group, *_ in line["buffers"]} == sizes.keys()
        for group, reduced, gathered in line["buffers"]:
            planned = of_gradients(args, Buffers(reduced, gathered), sizes[group])
            assert planned == {name: sent[group][name] for name in planned}
        once = of_gradients(arguments(line, overlap_param_gather=True), Buffers(*line["buffers"][0][1:]), 4)
        assert 2 * once["all-gather"] == sent["DATA_PARALLEL_GROUP_WITH_CP"]["all-gather"]


@pytest.fixture(scope="module")
def planned():
    return functools.cache(lambda name: plan_ranks(shlex.split(f"{COMMON} {LAYOUTS[name]} {SHORT}"), 4)[1])


def test_the_model_sends_what_the_plan_counts(counted, planned):
    """What each microbatch gathers and scatters, times their number; its losses come beside it."""
    for line in counted("pipeline"):
        rank = planned("pipeline")[line["rank"] // 2]
        sent = in_model({Sent(*key): count for *key, count in line["sent"]})["TP"]
        found = in_model(rank.sent)["TP"]
        for collective in ("all-gather", "reduce-scatter"):
            assert 2 * found[collective] == sent[collective]
        assert in_model(rank.sent).keys() == {"TP"}


def test_experts_send_what_the_plan_counts(counted, planned):
    """The plan's tokens are spread evenly over the experts; a job's are not."""
    (rank,) = planned("experts")
    assert in_model(rank.sent)["CP"] == by_group(counted("experts")[0])["CONTEXT_PARALLEL_GROUP"]
    found = in_model(rank.sent)["EP"]["all-to-all"]
    sent = [by_group(line)["EXPERT_MODEL_PARALLEL_GROUP"]["all-to-all"] for line in counted("experts")]
    assert found == pytest.approx(sum(sent) / len(sent), rel=0.1)


@pytest.mark.parametrize("name, kinds", [("pipeline", ["dense"]), ("experts", ["dense", "expert"])])
def test_the_plan_has_the_buffers(counted, planned, name, kinds):
    groups = {"DATA_PARALLEL_GROUP_WITH_CP": "dense", "EXPERT_DATA_PARALLEL_GROUP": "expert"}
    for line in counted(name):
        rank = planned(name)[line["rank"] // 2 if name == "pipeline" else 0]
        sums = {kind: [0, 0] for kind in kinds}
        for group, *sizes in line["buffers"]:
            sums[groups[group]] = [a + b for a, b in zip(sums[groups[group]], sizes, strict=True)]
        assert {kind: list(sizes) for kind, sizes in rank.buffers.items()} == sums
