"""What the plan says that ranks hold, against what they held: counted in real jobs."""

import functools
import json
import re
import shlex

import pytest

from megatron_periln.norms.kernels import backends
from megatron_periln.plan.ranks import plan_ranks
from tests.parallel.cases import ARCHITECTURES, LAYOUTS
from tests.parallel.jobs import COMMON

COUNTING = "tests.parallel.held_live.count_what_is_held"
SHORT = """--mock-data --train-iters 2 --lr-decay-iters 2 --lr-warmup-iters 0 --save-interval 100
    --vocab-size 255 --norm-placement peri"""
EXACT = ("weights", "gradients", "master weights", "moments")
JOBS = {
    "pipeline": (
        4,
        f"""{ARCHITECTURES["dense"]} {LAYOUTS["TP2xPP2+SP"][1]} --bf16 --use-distributed-optimizer
        --num-virtual-stages-per-pipeline-rank 2 --recompute-granularity selective
        --recompute-modules layernorm core_attn""",
    ),
    "experts": (2, f"{ARCHITECTURES['moe']} --expert-model-parallel-size 2"),
}


def planned(name):
    ranks, flags = JOBS[name]
    return plan_ranks(shlex.split(f"{COMMON} {flags} {SHORT}"), ranks)[1]


@pytest.fixture(scope="module")
def held(jobs):
    @functools.cache
    def run(name):
        ranks, flags = JOBS[name]
        finished = jobs.run(f"held-{name}", f"{flags} {SHORT}", ranks, changes=[COUNTING])
        lines = [json.loads(line) for line in re.findall("^held (.*)", finished.log, re.MULTILINE)]
        return {line["rank"]: line for line in lines}

    return run


@pytest.mark.parametrize("name", JOBS)
def test_ranks_hold_what_is_planned(held, name):
    for plan in planned(name):
        live = held(name)[plan.rank]
        assert {kind: plan.memory.get(kind, 0) for kind in EXACT} == {kind: live[kind] for kind in EXACT}
        assert plan.saved_per_microbatch == pytest.approx(live["saved"], rel=0.05)


def test_a_plan_that_forgets_what_output_norms_keep_is_found(held, monkeypatch):
    """The negative control."""

    def adds(output, sublayer_bias, residual, *_):
        return residual + output

    forgetful = backends.Backend("", backends._TORCH.norm, adds, backends._TORCH.add_norm, None)
    monkeypatch.setattr(backends, "backend_for", lambda _: forgetful)
    for plan in planned("pipeline"):
        live = held("pipeline")[plan.rank]
        assert plan.saved_per_microbatch != pytest.approx(live["saved"], rel=0.05)
