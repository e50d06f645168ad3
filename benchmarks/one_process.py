"""Megatron in a world of one process, and a model there."""

from __future__ import annotations

import argparse
from typing import Any

import torch

__all__ = ["build_gpt", "start_megatron"]


def start_megatron(
    device: str, micro_batch_size: int, num_microbatches: int = 1, *, graphs: bool = False
) -> None:
    """Start Megatron on ``device``, ``"cuda"`` or ``"cpu"``; with ``graphs``, generators fit CUDA graphs."""
    if device == "cpu":
        from megatron_periln import cpu

        cpu.activate()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    from megatron_periln.patches import fixes

    fixes.apply()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234, use_cudagraphable_rng=graphs)
    batch = micro_batch_size * num_microbatches
    init_num_microbatches_calculator(0, None, batch, micro_batch_size, 1, False)


def build_gpt(options: argparse.Namespace, placement: str) -> Any:
    """Return the GPT of norm placement ``placement`` that a command line describes."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_periln.models import GPTModelBuilder, GPTModelConfig
    from megatron_periln.norms import NormPlacement

    dtype = torch.bfloat16 if options.bf16 else torch.float32
    transformer = TransformerConfig(
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        ffn_hidden_size=4 * options.hidden_size,
        num_attention_heads=options.num_attention_heads,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=options.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        transformer_impl=options.transformer_impl,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    config = GPTModelConfig(
        transformer=transformer,
        norm_placement=NormPlacement.named(placement),
        vocab_size=options.vocab_size,
        seq_length=options.seq_length,
        position_embedding_type="rope",
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return GPTModelBuilder(config).build_model(groups).to(dtype).cuda()
