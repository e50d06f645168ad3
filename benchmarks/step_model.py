"""One model in which Pre-LN, Peri-LN and an unfused Peri-LN take turns, sharing weights and optimizer."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_periln import flag_files

__all__ = ["SIZES", "Size", "Trainer", "causal_flops"]


@dataclass(frozen=True)
class Size:
    """A model's shape: SwiGLU, RoPE, no biases, heads of 128, untied output."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int = 100352  # cl100k_base, padded


def _paper_size(name: str) -> Size:
    """Return the shape that a flag file of examples/paper describes."""
    words = flag_files.expand([f"@{Path(__file__).parents[1] / 'examples/paper' / name}.flags"])
    flags = ("--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads")
    return Size(*(int(words[words.index(flag) + 1]) for flag in flags))


SIZES = {name: _paper_size(name.lower()) for name in ("400M", "1.5B", "3.2B")} | {
    "tiny": Size(2, 64, 128, 4, 256)
}


def causal_flops(size: Size, tokens: int, seq_length: int) -> float:
    """Return the floating-point operations of a step's matrix products, attention at half its square."""
    layer = 4 * size.hidden_size**2 + 3 * size.hidden_size * size.ffn_hidden_size
    weights = size.num_layers * layer + size.hidden_size * size.vocab_size
    attention = size.num_layers * size.hidden_size * seq_length
    return 6.0 * tokens * (weights + attention)


class _MegatronsAdd(nn.Module):
    """Megatron's own bias-dropout-add: Pre-LN."""

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

        return get_bias_dropout_add(training, fused)


class _NormThenAdd(_MegatronsAdd):
    """A norm of its own kernel, then Megatron's add: what a norm inside the row-parallel linear costs."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        add = super().forward(training, fused)

        def norm_then_add(output_with_bias: Any, residual: Tensor, dropout: float) -> Tensor:
            sublayer_output, sublayer_bias = output_with_bias
            if sublayer_bias is not None:
                raise ValueError("this variant norms before the bias; build the model without biases")
            return add((self.norm(sublayer_output), None), residual, dropout)

        return norm_then_add


def _unfused_norm(layer: Any, output_norm: Any, transformer_engine: bool) -> nn.Module:
    """Return a norm by itself that shares the parameters of an output norm of the layer."""
    from megatron_periln.norms import Norm

    norm: nn.Module = Norm(layer.config, eps=output_norm.eps)
    if transformer_engine:
        import transformer_engine.pytorch as te

        norm = te.RMSNorm(output_norm.hidden_size, eps=output_norm.eps, params_dtype=output_norm.weight.dtype)
    norm.weight = output_norm.weight
    return norm


def _fused_next(layer: Any, transformer_engine: bool) -> tuple[nn.Module, nn.Module]:
    """Return the norm before a layer's MLP, and its first linear, apart; they share the parameters."""
    from megatron_periln.norms import FusedInputNorm

    first, norm = layer.mlp.linear_fc1, FusedInputNorm(layer.config)
    if not transformer_engine:
        norm.weight = layer.pre_mlp_layernorm.weight
        return norm, first
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    norm.weight = first.layer_norm_weight
    linear = TEColumnParallelLinear(
        layer.config.hidden_size,
        first.weight.shape[0],
        config=layer.config,
        init_method=layer.config.init_method,
        gather_output=False,
        bias=False,
        skip_bias_add=True,
        is_expert=False,
        tp_comm_buffer_name="fc1",
    )
    linear.weight = first.weight
    return norm, linear


class Trainer:
    """Training steps of one model whose bias-dropout-adds can be exchanged between steps.

    Parameters
    ----------
    options
        The command line of benchmarks/step.py.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.size = options, SIZES[options.size]
        self.graphs: dict[str, list[Any]] = {}  # of the variants that were captured
        self.model, self.optimizer, self.gpt = self._build()
        shape = (options.micro_batch_size, options.seq_length)
        self.tokens = torch.randint(0, self.size.vocab_size, shape, device="cuda")
        self.positions = torch.arange(options.seq_length, device="cuda").expand(shape)
        engine = options.transformer_impl == "transformer_engine"
        names = ("self_attn_bda", "mlp_bda")
        self.bdas = [
            (layer, name, getattr(layer, name)) for layer in self.gpt.decoder.layers for name in names
        ]
        add = _MegatronsAdd()
        self.ways: dict[str, list[nn.Module]] = {
            "pre": [add for _ in self.bdas],
            "peri": [bda for *_, bda in self.bdas],
            "unfused": [_NormThenAdd(_unfused_norm(layer, bda.norm, engine)) for layer, _, bda in self.bdas],
        }
        self.ways["fused-next"] = self.ways["peri"]
        self.apart = [(layer.pre_mlp_layernorm, layer.mlp.linear_fc1) for layer in self.gpt.decoder.layers]
        self.fused_next = [_fused_next(layer, engine) for layer in self.gpt.decoder.layers]

    def _build(self) -> tuple[Any, Any, Any]:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.module import Float16Module
        from megatron.core.transformer.transformer_config import TransformerConfig

        from megatron_periln.models import GPTModelBuilder, GPTModelConfig
        from megatron_periln.norms import PERI
        from megatron_periln.patches import fixes

        fixes.apply()
        size, options = self.size, self.options
        engine = options.transformer_impl == "transformer_engine"
        fp8 = {} if options.fp8 is None else {"fp8": "hybrid", "fp8_recipe": options.fp8}
        transformer = TransformerConfig(
            num_layers=size.num_layers,
            hidden_size=size.hidden_size,
            ffn_hidden_size=size.ffn_hidden_size,
            num_attention_heads=size.num_attention_heads,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            normalization="RMSNorm",
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            transformer_impl=options.transformer_impl,
            persist_layer_norm=False,
            gradient_accumulation_fusion=options.device == "cuda"
            and not options.no_gradient_accumulation_fusion,
            masked_softmax_fusion=False,
            bias_dropout_fusion=True,
            bias_activation_fusion=engine,
            apply_rope_fusion=engine,
            cross_entropy_loss_fusion=engine,
            finalize_model_grads_func=finalize_model_grads,
            **fp8,
        )
        config = GPTModelConfig(
            transformer=transformer,
            norm_placement=PERI,
            vocab_size=size.vocab_size,
            seq_length=options.seq_length,
            position_embedding_type="rope",
        )
        gpt = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
        gpt = gpt.bfloat16().cuda()
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        model = DistributedDataParallel(transformer, ddp, Float16Module(transformer, gpt))
        adam = OptimizerConfig(
            optimizer="adam", lr=1e-4, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
        )
        return model, get_megatron_optimizer(adam, [model]), gpt

    def take(self, variant: str) -> None:
        """Make the model ``pre``, ``peri``, ``fused-next`` or ``unfused``.

        ``peri:BACKEND`` if its backend isn't auto; ``WAY+graphs`` for layers in CUDA graphs.
        """
        from megatron_periln.norms import kernels

        name, _, graphs = variant.partition("+")
        way, _, backend = name.partition(":")
        if graphs not in ("", "graphs"):
            raise ValueError(f"unknown variant {variant!r}: a way, or one with +graphs")
        self._use_graphs(variant if graphs else None)
        kernels.use_backend(backend or "auto")
        for (layer, name, _), bda in zip(self.bdas, self.ways[way], strict=True):
            setattr(layer, name, bda)
        fused = way == "fused-next"
        for layer, parts in zip(
            self.gpt.decoder.layers, self.fused_next if fused else self.apart, strict=True
        ):
            if (
                parts[1] is not layer.mlp.linear_fc1
            ):  # or its weights in FP8 would count as memory of the next
                getattr(layer.mlp.linear_fc1, "_fp8_workspaces", {}).clear()
            layer.pre_mlp_layernorm, layer.mlp.linear_fc1 = parts
            if way in ("peri", "fused-next"):
                layer.self_attn_bda.norm.compute_next(parts[0] if fused else None)
        self.gpt.embedding.norm.bypassed = way == "pre"

    def _use_graphs(self, variant: str | None) -> None:
        """Have the layers replay the graphs of ``variant``, captured in its first step; None for none.

        A graph holds the modules that a layer had when it was captured: each variant has its own graphs.
        """
        from megatron.core.transformer.cuda_graphs import (
            CudaGraphManager,
            _CudagraphGlobalRecord,
            annotate_first_last_layer,
        )

        layers, config = self.gpt.decoder.layers, self.gpt.config
        for layer in layers:
            layer._modules.pop("cudagraph_manager", None)
        config.cuda_graph_impl = "none" if variant is None else "local"
        if variant is None:
            return
        _CudagraphGlobalRecord.cudagraph_created = variant in self.graphs
        annotate_first_last_layer(layers)
        if variant not in self.graphs:
            self.graphs[variant] = [CudaGraphManager(config) for _ in layers]
        for layer, manager in zip(layers, self.graphs[variant], strict=True):
            layer.cudagraph_manager = manager

    def step(self) -> Any:
        """Run one training step: microbatches, gradient reduction and Adam; return the losses."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(()),
            model=[self.model],
            num_microbatches=self.options.num_microbatches,
            seq_length=self.options.seq_length,
            micro_batch_size=self.options.micro_batch_size,
            forward_only=False,
        )
        self.optimizer.step()
        return losses

    def _forward(self, _: Any, module: Any) -> Any:
        return module(self.tokens, self.positions, None, labels=self.tokens), _summed


def _summed(losses: Tensor) -> Any:
    total, count = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int, device="cuda")
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}
