"""What each rank sends in a step, to whom, and over which links."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_periln.plan.costs.collectives import Sent
from megatron_periln.plan.machine.gpus import Gpu
from megatron_periln.plan.machine.links import Group, Layout

__all__ = [
    "Buffers",
    "Traffic",
    "in_model",
    "of_context",
    "of_embedding",
    "of_gradients",
    "of_pipeline",
    "of_rank",
    "traffic",
]


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in one of its groups.

    Attributes
    ----------
    group
        Whom it speaks with.
    sent
        Bytes of a step, by collective.
    over_network
        Those of them that leave the node.
    seconds
        How long the slower of the links takes for its part, were it alone and nothing overlapped.
    """

    group: Group
    sent: dict[str, int]
    over_network: int
    seconds: float

    @property
    def bytes(self) -> int:
        """All that is sent."""
        return sum(self.sent.values())


@dataclass(frozen=True)
class Buffers:
    """Megatron's contiguous buffers of a rank's parameters, padding included, in bytes.

    Attributes
    ----------
    gradients
        In the dtype that they are reduced in.
    parameters
        In the dtype that they are gathered in.
    """

    gradients: int
    parameters: int


def traffic(group: Group, sent: Mapping[str, int], rank: int, gpu: Gpu) -> Traffic:
    """Return what ``rank`` sends in a group, with the part that leaves its node.

    A ring leaves a node by one rank of those that the group has there, and there are as many rings, each
    with its part of the bytes; an all-to-all sends to each rank alike; what is sent to a stage goes where
    that is.
    """
    size, here = len(group.ranks), group.on_node_of(rank)
    leaves = 0.0
    for collective, count in sent.items():
        if here == size:
            continue
        if collective == "all-to-all":
            leaves += count * (size - here) / (size - 1)
        elif collective.startswith("send"):
            leaves += count * _far_neighbours(group, rank, collective)
        else:
            leaves += count / here
    within = sum(sent.values()) - leaves
    seconds = max(leaves / gpu.network, within / gpu.nvlink)
    return Traffic(group, dict(sent), round(leaves), seconds)


def _far_neighbours(group: Group, rank: int, collective: str) -> float:
    """Return which part of what is sent to the next, or to the previous, leaves the node: all or nothing."""
    step = -1 if collective.endswith("back") else 1
    other = group.ranks[(group.ranks.index(rank) + step) % len(group.ranks)]
    return float(other // group.node != rank // group.node)


_KINDS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "TP",
    "CONTEXT_PARALLEL_GROUP": "CP",
    "EXPERT_MODEL_PARALLEL_GROUP": "EP",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert TP",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert TP and EP",
}
"""The kinds of groups in which a model's own code sends, by the description that Megatron gives them."""


def in_model(counted: Mapping[Sent, int]) -> dict[str, dict[str, int]]:
    """Return what was counted while the model ran, by kind of group and collective."""
    found: dict[str, dict[str, int]] = {}
    for key, count in counted.items():
        if kind := _KINDS.get(key.group):
            by_collective = found.setdefault(kind, {})
            by_collective[key.collective] = by_collective.get(key.collective, 0) + count
    return found


def of_pipeline(args: Namespace, stage: int) -> dict[str, int]:
    """Return what a stage sends in a step (``schedules.get_tensor_shapes``): outputs on, gradients back."""
    stages, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    if stages == 1:
        return {}
    tokens = args.seq_length // args.context_parallel_size
    if args.sequence_parallel:
        tokens //= args.tensor_model_parallel_size
    each = tokens * args.micro_batch_size * args.hidden_size * args.params_dtype.itemsize
    microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    forward = chunks - (stage == stages - 1)
    backward = chunks - (stage == 0)
    return {"send": microbatches * forward * each, "send back": microbatches * backward * each}


def of_gradients(args: Namespace, buffers: Buffers, ranks: int) -> dict[str, int]:
    """Return what data parallelism sends in a step.

    With the distributed optimizer gradients are reduce-scattered and parameters gathered; without, gradients
    are all-reduced. Overlapping changes when, not how much, but for one thing: a model with experts has two
    optimizers, and without ``--overlap-param-gather`` each of them gathers all parameters
    (``DistributedOptimizer.start_param_sync_for_bucket_group_subset``).
    """
    if ranks == 1:
        return {}
    ring = (ranks - 1) / ranks
    if not args.use_distributed_optimizer:
        return {"all-reduce": round(2 * ring * buffers.gradients)}
    gathers = 2 if args.num_experts and not args.overlap_param_gather else 1
    return {
        "reduce-scatter": round(ring * buffers.gradients),
        "all-gather": round(gathers * ring * buffers.parameters),
    }


def of_embedding(args: Namespace, stage: int) -> dict[str, int]:
    """Return what the first and the last stage send in a step to keep a tied embedding the same."""
    stages = args.pipeline_model_parallel_size
    if stages == 1 or args.untie_embeddings_and_output_weights or stage not in (0, stages - 1):
        return {}
    element = 2 if args.grad_reduce_in_bf16 else 4
    rows = args.padded_vocab_size // args.tensor_model_parallel_size
    return {"all-reduce": rows * args.hidden_size * element}  # twice (n - 1) / n of it, for two ranks


def of_context(args: Namespace, layers: int) -> dict[str, int]:
    """Return what Transformer Engine's attention sends in a step of a rank with so many layers.

    transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py of 2.17: ``p2p`` sends
    keys and values around the ring in forward, and both and their gradients in backward; ``all_gather``
    gathers them in both, and scatters their gradients; ``a2a`` exchanges queries, keys, values and outputs,
    and their gradients. Recomputation sends what forward sends once more.
    """
    size = args.context_parallel_size
    if size == 1:
        return {}
    heads, tp = args.num_attention_heads, args.tensor_model_parallel_size
    groups = max(args.num_query_groups if args.group_query_attention else heads, tp)
    tokens = args.seq_length // size * args.micro_batch_size
    element = args.params_dtype.itemsize
    if args.multi_latent_attention:
        query = tokens * heads // tp * (args.qk_head_dim + args.qk_pos_emb_head_dim) * element
        output = tokens * heads // tp * args.v_head_dim * element
        keys_values = query + output
    else:
        query = output = tokens * heads // tp * args.kv_channels * element
        keys_values = 2 * tokens * groups // tp * args.kv_channels * element
    kind = args.cp_comm_type[0] if isinstance(args.cp_comm_type, list) else args.cp_comm_type
    again = 1 + (args.recompute_granularity is not None and _recomputes_attention(args))
    steps = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size) * layers
    if kind == "a2a":
        return {"all-to-all": steps * (1 + again) * (query + keys_values + output) * (size - 1) // size}
    if kind == "all_gather":
        return {
            "all-gather": steps * (1 + again) * keys_values * (size - 1),
            "reduce-scatter": steps * keys_values * (size - 1),
        }
    return {"send": steps * (2 + again) * keys_values * (size - 1)}


def _recomputes_attention(args: Namespace) -> bool:
    return args.recompute_granularity == "full" or "core_attn" in (args.recompute_modules or [])


def of_rank(
    layout: Layout, rank: int, by_kind: Mapping[str, Mapping[str, int]], gpu: Gpu
) -> Iterator[Traffic]:
    """Yield a rank's traffic of all groups in which it sends, the busiest first."""
    found = [
        traffic(layout.group(kind, rank), sent, rank, gpu)
        for kind, sent in by_kind.items()
        if sum(sent.values())
    ]
    yield from sorted(found, key=lambda each: -each.seconds)
