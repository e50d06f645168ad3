"""What a rank is planned to hold: against an H100's peaks, and against what is known of layouts."""

import inspect

import pytest
import torch
from megatron.core import parallel_state

from megatron_periln.errors import UsageError
from megatron_periln.norms.kernels import reference
from megatron_periln.plan import ranks
from megatron_periln.plan.model import engine, stages
from megatron_periln.plan.model.chunks import Pass
from megatron_periln.plan.model.held import at_its_peak
from megatron_periln.plan.ranks import plan_ranks

COMMON = """--tokenizer-type NullTokenizer --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type rope --untie-embeddings-and-output-weights --bf16 --use-distributed-optimizer
    --hidden-dropout 0 --attention-dropout 0 --cross-entropy-loss-fusion --train-iters 10 --lr 1e-4
    --mock-data --micro-batch-size 2"""
LARGE = f"""{COMMON} --num-layers 28 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 16
    --seq-length 4096 --max-position-embeddings 4096 --global-batch-size 4 --vocab-size 100350"""
SMALL = f"""{COMMON} --norm-placement peri --num-layers 8 --hidden-size 64 --ffn-hidden-size 128
    --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 --global-batch-size 64
    --vocab-size 255 --eval-iters 0"""
# Peaks of allocated GB, benchmarks/step.py on an H100 with Transformer Engine 2.17.1.
H100 = {"peri": 61.698116096, "pre --fp8-format hybrid": 60.958509568}


def plan(flags, world_size=1):
    return plan_ranks(flags.split(), world_size)


@pytest.mark.parametrize("placement", H100)
def test_an_h100_held_what_is_planned(placement):
    _, (rank,) = plan(f"{LARGE} --norm-placement {placement}")
    assert rank.total / 1e9 == pytest.approx(H100[placement], rel=0.01)


def test_a_plan_that_forgets_what_output_norms_keep_is_found(monkeypatch):
    """The negative control: two sublayer outputs a layer, 3 % of what the H100 held."""
    monkeypatch.setattr(
        engine, "_KERNELS", engine._KERNELS.__class__("", engine._norm, _adds, engine._add_norm, None)
    )
    _, (rank,) = plan(f"{LARGE} --norm-placement peri")
    assert rank.total / 1e9 != pytest.approx(H100["peri"], rel=0.01)


def _adds(output, of, residual, *_):
    return residual + output


def test_only_kinds_of_stages_are_built(monkeypatch):
    built, hold = [], ranks.hold
    monkeypatch.setattr(
        ranks, "hold", lambda args, with_, rank: built.append(rank) or hold(args, with_, rank)
    )
    _, plans = plan(f"{SMALL} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4", 32)
    assert [(each.name, each.rank, each.ranks_alike) for each in plans] == [
        ("first stage", 0, 8),
        ("stage 2", 8, 8),
        ("stage 3", 16, 8),
        ("last stage", 24, 8),
    ]
    assert built == [0, 8, 24]
    assert [each.microbatches_in_flight for each in plans] == [(4,), (3,), (2,), (1,)]
    assert [each.layers for each in plans] == [(2,)] * 4


def test_optimizer_state_is_sharded_and_has_the_bytes_of_its_dtypes():
    """Of bf16 parameters: 4 + 8 bytes, shared by 4 ranks; precision-aware, 2 for a remainder, and 2 + 1."""
    _, (rank,) = plan(SMALL, 4)
    shard = rank.memory["weights"] // 2 // 4
    assert rank.memory["master weights"] == pytest.approx(4 * shard, rel=0.01)
    assert rank.memory["moments"] == 2 * rank.memory["master weights"]
    assert rank.memory["gradients"] == 2 * rank.memory["weights"]
    aware = "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype fp8"
    _, (smaller,) = plan(f"{SMALL} {aware}", 4)
    assert smaller.memory["master weights"] * 2 == rank.memory["master weights"]
    assert smaller.memory["moments"] * 8 == rank.memory["moments"] * 3


def test_recomputation_saves_less():
    def saved(flags):
        _, (rank,) = plan(f"{SMALL} {flags}")
        return rank.saved_per_microbatch[0]

    full = saved("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    norms = saved("--recompute-granularity selective --recompute-modules layernorm")
    nothing = saved("")
    assert full < norms < nothing
    rows = 64 * 2
    # Of both input norms of a layer the outputs, in bf16, and a number in fp32 a row.
    assert nothing - norms == 8 * 2 * rows * (64 * 2 + 4)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_experts_get_the_same_number_of_tokens(dispatcher):
    experts = f"""--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type {dispatcher}
        --expert-model-parallel-size 2 --moe-grouped-gemm --moe-ffn-hidden-size 128"""
    _, (rank,) = plan(f"{SMALL} {experts}", 2)
    assert rank.expert_parameters == 8 * 2 * 3 * 64 * 128
    assert {"weights", "gradients", "activations"} <= rank.memory.keys()


def test_the_peak_is_that_of_the_order_of_passes():
    one = Pass({"a": 10}, {"a": 11}, {"a": 12}, 0)
    other = Pass({"a": 1}, {"a": 30}, {"a": 1}, 0)
    order = [(0, True), (0, True), (1, True), (1, False), (0, False), (0, False)]
    assert at_its_peak(order, [one, other])[0]["a"] == 10 + 10 + 30
    assert at_its_peak(order, [one, other])[1] == (2, 1)
    assert at_its_peak([(0, True), (0, False)], [one]) == ({"a": 12, "activations": 0}, (1,))


def test_a_plan_leaves_the_process_as_it_was(single_process):
    group, world = parallel_state.get_data_parallel_group(), torch.distributed.get_world_size()
    state = torch.get_rng_state()
    plan(SMALL, 2)
    assert parallel_state.get_data_parallel_group() is group
    assert torch.distributed.get_world_size() == world == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.zeros(1).item() == 0


@pytest.mark.parametrize(
    ("flags", "world_size", "says"),
    [
        (f"{SMALL} --tensor-model-parallel-size 3", 3, "--tensor-model-parallel-size"),
        (SMALL, 3, "--global-batch-size"),
        (SMALL.replace("--num-layers 8", ""), 1, "--num-layers"),
        (SMALL, 0, "--world-size"),
        (f"{SMALL} --no-such-flag", 1, "--no-such-flag"),
        (f"{SMALL} --use-megatron-fsdp", 1, "a plan does not know what FSDP shards and gathers"),
        (
            f"{SMALL.replace('--num-layers 8', '')} --hybrid-layer-pattern M-G-",
            1,
            "kernels of Mamba, gated delta net layers",
        ),
    ],
)
def test_flags_that_are_wrong_are_named(flags, world_size, says):
    with pytest.raises(UsageError, match=says):
        plan(flags, world_size)


def test_names_of_stages():
    assert [stages.name_of(stage, 3) for stage in range(3)] == ["first stage", "stage 2", "last stage"]
    assert stages.name_of(0, 1) == "every rank"


def test_the_layers_of_a_layout():
    """Two stages of two virtual ones: what a stage has later is behind what the others have earlier."""
    flags = f"{SMALL} --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t*2|t*3|t*2L"
    _, (first, last) = plan(flags, 2)
    assert (first.layers, last.layers) == ((1, 3), (2, 2))
    even = plan(f"{SMALL} --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2", 2)[1]
    assert sum(each.parameters for each in even) == first.parameters + last.parameters


@pytest.mark.parametrize("name", ["norm", "norm_add", "add_norm", "norm_add_norm", "add", "gpas"])
def test_norms_of_the_plan_take_what_those_of_the_specification_take(name):
    """Scales among them, which come last."""
    given = inspect.signature(getattr(reference, name)).parameters
    inspect.signature(getattr(engine._KERNELS, name)).bind(*given)
