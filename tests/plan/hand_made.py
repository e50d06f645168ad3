"""A plan of hand-made ranks: what stands on them is tested without them being built."""

from argparse import Namespace

import torch

from megatron_periln.plan.answer.planned import Machine
from megatron_periln.plan.costs.collectives import Sent
from megatron_periln.plan.machine.gpus import GIB, GPUS
from megatron_periln.plan.ranks import RankPlan

MACHINE = Machine(GPUS["h100-80"], 8, 0.4, 10e9)


def arguments(**changes):
    """Validated arguments of a model of 8 layers x 1024, on 32 GPUs: TP2 x PP2 x DP8."""
    args = {
        "attention_output_gate": False,
        "bf16": True,
        "context_parallel_size": 1,
        "cp_comm_type": ["p2p"],
        "cross_entropy_loss_fusion": True,
        "experimental_attention_variant": None,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "ffn_hidden_size": 4096,
        "fp16": False,
        "global_batch_size": 128,
        "grad_reduce_in_bf16": False,
        "group_query_attention": False,
        "hidden_size": 1024,
        "hybrid_layer_pattern": None,
        "kv_channels": 128,
        "linear_attention_freq": None,
        "micro_batch_size": 2,
        "microbatch_group_size_per_vp_stage": None,
        "moe_ffn_hidden_size": None,
        "moe_latent_size": None,
        "moe_layer_freq": 1,
        "moe_shared_expert_intermediate_size": None,
        "mtp_num_layers": None,
        "multi_latent_attention": False,
        "no_save_optim": None,
        "norm_placement": "peri",
        "num_attention_heads": 8,
        "num_experts": None,
        "num_layers": 8,
        "num_query_groups": 8,
        "overlap_grad_reduce": True,
        "overlap_moe_expert_parallel_comm": False,
        "overlap_param_gather": True,
        "padded_vocab_size": 32768,
        "params_dtype": torch.bfloat16,
        "pipeline_model_parallel_size": 2,
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_modules": None,
        "recompute_num_layers": None,
        "seq_length": 2048,
        "sequence_parallel": True,
        "swiglu": False,
        "tensor_model_parallel_size": 2,
        "train_iters": 1000,
        "transformer_impl": "transformer_engine",
        "train_samples": None,
        "untie_embeddings_and_output_weights": True,
        "use_distributed_optimizer": True,
        "use_precision_aware_optimizer": False,
        "use_tp_pp_dp_mapping": False,
        "virtual_pipeline_model_parallel_size": None,
        "world_size": 32,
    } | changes
    model = args["tensor_model_parallel_size"] * args["pipeline_model_parallel_size"]
    args["data_parallel_size"] = args["world_size"] // (model * args["context_parallel_size"])
    return Namespace(**args)


def rank(stage=0, activations=20 * GIB, **changes):
    """Return a rank of one of two stages."""
    fields = {
        "rank": 16 * stage,
        "ranks_alike": 16,
        "name": ("first stage", "last stage")[stage],
        "pipeline_stage": stage,
        "parameters": 40_000_000,
        "memory": {
            "weights": 80_000_000,
            "gradients": 160_000_000,
            "master weights": 20_000_000,
            "moments": 40_000_000,
            "activations": activations,
        },
        "microbatches_in_flight": (2 - stage,),
        "layers": (4,),
        "sent": {Sent("TENSOR_MODEL_PARALLEL_GROUP", 2, "all-gather"): 1_000_000},
        "buffers": {"dense": (160_000_000, 80_000_000)},
        "replicated_parameters": 8192,
    }
    return RankPlan(**(fields | changes))


def core(planned):
    """Stand in for ``plan_ranks``: ``planned`` returns activations' bytes for the flags, or raises."""

    def plan_ranks(flags, world_size):
        words = dict(zip(flags, [*flags[1:], ""], strict=True))
        changes = {"world_size": world_size}
        for flag, name in (
            ("--micro-batch-size", "micro_batch_size"),
            ("--tensor-model-parallel-size", "tensor_model_parallel_size"),
        ):
            if flag in words:
                changes[name] = int(words[flag])
        if "--recompute-granularity" in words:
            changes["recompute_granularity"] = words["--recompute-granularity"]
            changes["recompute_modules"] = [word for word in ("layernorm", "mlp") if word in flags]
            changes["recompute_method"] = words.get("--recompute-method")
        changes["norm_placement"] = words.get("--norm-placement", "peri")
        return arguments(**changes), [rank(0, planned(flags)), rank(1, planned(flags) // 2)]

    return plan_ranks
