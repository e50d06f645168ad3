"""What CUDA graphs would repeat although it changes is refused before training."""

from argparse import Namespace

import pytest
from megatron.core.transformer.enums import CudaGraphModule

from megatron_periln.errors import UsageError
from megatron_periln.rules import refuse
from megatron_periln.training.graph_checks import GRAPHS

FITTING = {
    "cuda_graph_impl": "local",
    "cuda_graph_modules": [],
    "fuse_pre_mlp_norm": False,
    "num_experts": None,
    "moe_pad_expert_input_to_capacity": False,
    "moe_expert_rank_capacity_factor": None,
    "dataloader_inter_document_masking": False,
    "check_for_spiky_loss": False,
    "recompute_granularity": None,
    "recompute_modules": ["core_attn"],  # Megatron's default, without effect
    "rampup_batch_size": None,
    "step_batch_size_schedule": None,
    "pipeline_model_parallel_size": 1,
    "micro_batch_size": 2,
    "eval_micro_batch_size": 2,
    "eval_iters": 2,
    "full_validation": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
ATTENTION, MLP, ROUTER = CudaGraphModule.attn, CudaGraphModule.mlp, CudaGraphModule.moe_router
ENGINE = {"cuda_graph_impl": "transformer_engine"}
WHOLE = {"cuda_graph_impl": "full_iteration"}
FUSED = {"fuse_pre_mlp_norm": True}
EXPERTS = {"num_experts": 4}
RECOMPUTED = {"recompute_granularity": "selective"}
DROPOUT = {"hidden_dropout": 0.1}


def check(**changes):
    assert changes.keys() <= FITTING.keys()
    refuse(Namespace(**{**FITTING, **changes}), GRAPHS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        FUSED,
        {**FUSED, "cuda_graph_modules": [ATTENTION]},  # Megatron's own graphs are of whole dense layers
        {**FUSED, **ENGINE},
        {**FUSED, **ENGINE, "cuda_graph_modules": [ATTENTION, MLP]},
        {**ENGINE, "cuda_graph_modules": [ATTENTION]},
        {**FUSED, **WHOLE},
        {"cuda_graph_impl": "none", "dataloader_inter_document_masking": True, "check_for_spiky_loss": True},
        {"check_for_spiky_loss": True},
        {"rampup_batch_size": [8, 8, 100]},
        {**ENGINE, "rampup_batch_size": [8, 8, 100], "eval_micro_batch_size": 1},
        {**DROPOUT, "eval_iters": 0},
        {**RECOMPUTED, "recompute_modules": ["layernorm", "moe_act"]},
        {**RECOMPUTED, **ENGINE, "cuda_graph_modules": [MLP]},
        {**RECOMPUTED, **WHOLE},
        {**RECOMPUTED, "cuda_graph_impl": "none"},
        {**DROPOUT, **ENGINE},
        {**DROPOUT, **WHOLE},
        {**EXPERTS, "cuda_graph_modules": [ATTENTION, ROUTER]},
        {**EXPERTS, **ENGINE, "cuda_graph_modules": [ATTENTION, ROUTER]},
        {**EXPERTS, "moe_pad_expert_input_to_capacity": True},
        {**EXPERTS, **WHOLE, "moe_expert_rank_capacity_factor": 1.5},
        {**EXPERTS, "cuda_graph_impl": "none"},
    ],
)
def test_what_graphs_can_repeat_is_let_through(changes):
    check(**changes)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({**FUSED, **ENGINE, "cuda_graph_modules": [ATTENTION]}, "in different graphs; .* name both"),
        ({**FUSED, **ENGINE, "cuda_graph_modules": [MLP]}, "in different graphs"),
        (
            {**FUSED, **ENGINE, "cuda_graph_modules": [ATTENTION, ROUTER], "num_experts": 4},
            "in different graphs",
        ),
        ({**FUSED, "cuda_graph_modules": [ROUTER], "num_experts": 4}, "in different graphs"),
        ({"dataloader_inter_document_masking": True}, "--cuda-graph-impl local: .* packs others"),
        ({**ENGINE, "dataloader_inter_document_masking": True}, "transformer_engine: .* packs others"),
        ({**WHOLE, "check_for_spiky_loss": True}, "--check-for-spiky-loss reads the loss"),
        ({**WHOLE, "rampup_batch_size": [8, 8, 100]}, "full_iteration: .* as many micro-batches"),
        (
            {"step_batch_size_schedule": "0:8 100:16", "pipeline_model_parallel_size": 2},
            "local: .* as many micro-batches",
        ),
        ({"eval_micro_batch_size": 1}, "--eval-micro-batch-size 1: .* captured with, 2; give that"),
        (RECOMPUTED, "local: .* can't be captured: core_attn of --recompute-modules"),
        ({**RECOMPUTED, "recompute_modules": ["mlp"], "cuda_graph_modules": [ATTENTION]}, "captured: mlp of"),
        ({**RECOMPUTED, **ENGINE, "cuda_graph_modules": [ATTENTION]}, "captured: core_attn of"),
        (
            EXPERTS,
            "local: the host waits for how many tokens .* give --cuda-graph-modules attn moe_router, or",
        ),
        ({**EXPERTS, **ENGINE}, "transformer_engine: the host waits for .*; give --cuda-graph-modules attn"),
        ({**EXPERTS, **WHOLE}, "full_iteration: the host waits for .* give --cuda-graph-impl local or"),
        (DROPOUT, "evaluates with the graphs of training, and their dropout"),
        ({"attention_dropout": 0.1, "eval_iters": 0, "full_validation": True}, "and their dropout"),
    ],
)
def test_what_would_change_under_a_graph_is_refused(changes, error):
    with pytest.raises(UsageError, match=error):
        check(**changes)
