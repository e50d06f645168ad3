"""Rules for CUDA graphs (``--cuda-graph-impl``): a graph repeats what it was captured with.

Megatron refuses most of what graphs can't do when it validates the arguments. These it would come to while it
trains, in an assertion, an error of CUDA's, or not at all.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron.core.transformer.enums import CudaGraphModule

from megatron_periln.rules import Check, Rule

__all__ = ["GRAPHS"]


def _has(args: Namespace) -> bool:
    return bool(args.cuda_graph_impl != "none")


def _divides_layers(args: Namespace) -> bool:
    """Tell whether attention and the MLP's norm can be in different graphs, or only one of them in any.

    Megatron's own ("local") graphs hold whole layers, whatever is named, but for mixtures of experts.
    """
    modules = set(args.cuda_graph_modules or ())
    if not modules:
        return False
    if args.cuda_graph_impl == "local":
        return bool(args.num_experts)
    return not {CudaGraphModule.attn, CudaGraphModule.mlp} <= modules or bool(args.num_experts)


def _recomputed_within(args: Namespace) -> list[str]:
    """Return the modules in graphs that are recomputed by a checkpoint, not only their output.

    Capture differentiates by ``torch.autograd.grad``, in which torch lets no checkpoint recompute.
    """
    if (
        args.cuda_graph_impl not in ("local", "transformer_engine")
        or args.recompute_granularity != "selective"
    ):
        return []
    modules = set(args.cuda_graph_modules or ())
    if args.cuda_graph_impl == "local" and not args.num_experts:
        modules = set()  # whole layers
    holders = {
        "core_attn": {CudaGraphModule.attn},
        "mlp": {CudaGraphModule.mlp},
        "moe": {CudaGraphModule.moe, CudaGraphModule.moe_router},
        "shared_experts": {CudaGraphModule.moe, CudaGraphModule.moe_router},
    }
    recomputed = args.recompute_modules or ()
    return [name for name in holders if name in recomputed and (not modules or holders[name] & modules)]


def _recomputation(args: Namespace) -> Iterator[str]:
    if within := _recomputed_within(args):
        yield (
            f"--cuda-graph-impl {args.cuda_graph_impl}: what is recomputed within a graph can't be captured: "
            f"{', '.join(within)} of --recompute-modules; leave it out (layernorm, moe_act and mla_up_proj "
            "can stay)"
        )


def _experts(args: Namespace) -> Iterator[str]:
    """Refuse whole layers of experts whose numbers of tokens the host asks for.

    Megatron refuses the same of ``--cuda-graph-modules moe`` (transformer_config.py), and passes over layers
    that are captured whole, where no module is named.
    """
    if not (_has(args) and args.num_experts) or args.cuda_graph_modules:
        return
    if args.moe_pad_expert_input_to_capacity or args.moe_expert_rank_capacity_factor is not None:
        return
    parts = (
        "--cuda-graph-impl local or transformer_engine with --cuda-graph-modules attn moe_router"
        if args.cuda_graph_impl == "full_iteration"
        else "--cuda-graph-modules attn moe_router"
    )
    yield (
        f"--cuda-graph-impl {args.cuda_graph_impl}: the host waits for how many tokens each expert is given, "
        f"which no graph can hold; give {parts}, or as many tokens to each: --moe-expert-capacity-factor and "
        "--moe-pad-expert-input-to-capacity"
    )
    args.moe_pad_expert_input_to_capacity = True


def _ramps(args: Namespace) -> bool:
    return bool(args.rampup_batch_size or args.step_batch_size_schedule)


def _counts_microbatches(args: Namespace) -> bool:
    """Tell whether graphs are captured for so many micro-batches."""
    if args.cuda_graph_impl == "local":
        return bool(args.pipeline_model_parallel_size > 1)
    return bool(args.cuda_graph_impl == "full_iteration")


GRAPHS: tuple[Check, ...] = (
    Rule(
        lambda args: _has(args) and args.fuse_pre_mlp_norm and _divides_layers(args),
        "--fuse-pre-mlp-norm: attention's output norm computes the MLP's norm, and --cuda-graph-modules puts "
        "the two in different graphs; leave out one of the flags, or name both attn and mlp",
        {"fuse_pre_mlp_norm": False},
    ),
    Rule(
        lambda args: _has(args) and args.dataloader_inter_document_masking,
        "--cuda-graph-impl {cuda_graph_impl}: a graph repeats the lengths of the documents it was captured "
        "with, and --dataloader-inter-document-masking packs others into each batch; drop one of them",
        {"dataloader_inter_document_masking": False},
    ),
    _recomputation,
    _experts,
    Rule(
        lambda args: args.cuda_graph_impl == "full_iteration" and args.check_for_spiky_loss,
        "--check-for-spiky-loss reads the loss in the middle of a step, which --cuda-graph-impl "
        "full_iteration has captured; drop one of them",
        {"check_for_spiky_loss": False},
    ),
    Rule(
        lambda args: _ramps(args) and _counts_microbatches(args),
        "--cuda-graph-impl {cuda_graph_impl}: its graphs are of as many micro-batches as the first step has, "
        "and --rampup-batch-size or --step-batch-size-schedule changes their number; drop one of them",
        {"rampup_batch_size": None, "step_batch_size_schedule": None},
    ),
    Rule(
        lambda args: (
            args.cuda_graph_impl == "local"
            and args.eval_micro_batch_size not in (None, args.micro_batch_size)
        ),
        "--eval-micro-batch-size {eval_micro_batch_size}: graphs of --cuda-graph-impl local take "
        "micro-batches of the size they were captured with, {micro_batch_size}; give that",
    ),
    Rule(
        lambda args: (
            args.cuda_graph_impl == "local"
            and (args.hidden_dropout or args.attention_dropout)
            and (args.eval_iters or args.full_validation)
        ),
        "--cuda-graph-impl local evaluates with the graphs of training, and their dropout; give "
        "--hidden-dropout 0 --attention-dropout 0, or --eval-iters 0, or Transformer Engine's graphs",
        {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
)
"""What a graph would repeat although it changes."""
