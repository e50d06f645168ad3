"""Gradient norms of each layer's parameters, as the optimizer is about to see them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_periln.monitor.layer_sums import Sums

__all__ = ["add_parameter_gradients", "count_parameters", "own_pieces"]

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_PARTS = {"self_attention": "attention", "mixer": "attention", "mlp": "mlp"}


@torch.no_grad()
def add_parameter_gradients(chunks: Sequence[nn.Module], sums: Sums, loss_scale: Tensor) -> None:
    """Add the squares of this rank's share of the final gradients, each element on one rank only.

    Parameters
    ----------
    chunks
        The model chunks, wrapped by Megatron's ``DistributedDataParallel``, after
        ``finalize_model_grads`` and before the optimizer's step, which unscales and clips.
    sums
        Receives them, by layer and part (attention, MLP, norms, other).
    loss_scale
        Of the optimizer; the gradients still have it.

    Notes
    -----
    A parameter named ``...norm...`` is a norm's weight or bias, query and key norms included. Parameters
    that the tensor-parallel ranks share count on the first of them, as in Megatron's
    ``get_grad_norm_fp32``, and embeddings that stages share on the first stage. Data-parallel
    replicas count one part each, the part that the distributed optimizer reduces to.
    """
    pieces: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for chunk in chunks:
        places = dict(_places(unwrap_model(chunk), sums))
        for parameter, piece in own_pieces(chunk):
            if _counts_here(parameter):
                pieces[places[parameter]].append(piece)
    for (group, row), gradients in pieces.items():
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
        square = norms.double().square().sum() / loss_scale.double().square().squeeze()
        sums.add(group, row, torch.stack([torch.ones_like(square), square]))


def count_parameters(chunks: Sequence[nn.Module]) -> int:
    """Return the number of trainable parameters of the whole model; every rank must call it."""
    own = sum(
        piece.numel() for chunk in chunks for parameter, piece in own_pieces(chunk) if _counts_here(parameter)
    )
    total = torch.tensor(own, device="cuda")
    torch.distributed.all_reduce(total)
    return int(total)


def _places(model: nn.Module, sums: Sums) -> Iterator[tuple[nn.Parameter, tuple[str, int]]]:
    """Say of each parameter which group and row of ``sums`` it belongs to."""
    decoder: Any = model.decoder
    ends = {"embedding.": 0, "decoder.final_": sums.rest - 1, "output_layer.": sums.rest - 1}
    for name, parameter in model.named_parameters():
        if match := _LAYER.match(name):
            row, inner = decoder.layers[int(match[1])].layer_number, match[2]
        else:
            row = next((end for prefix, end in ends.items() if name.startswith(prefix)), sums.rest)
            inner = name
        part = "norm" if "norm" in inner else _PARTS.get(inner.split(".")[0], "other")
        yield parameter, (f"{part}_gradient", row)


def own_pieces(chunk: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Cut every bucket of gradients into one part a data-parallel replica; give this rank's parameters."""
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        if group.ddp_config.use_distributed_optimizer:
            replicas = group.intra_distributed_optimizer_instance_group
        else:
            replicas = group.data_parallel_group
        copies = getattr(group, "inter_distributed_optimizer_instance_group", None)
        if copies is not None and copies.rank() > 0:
            continue
        for bucket in group.buckets:
            size = -(-bucket.grad_data.numel() // replicas.size())
            first, end = replicas.rank() * size, (replicas.rank() + 1) * size
            for parameter, (start, stop) in bucket.param_to_index.items():
                if max(start, first) < min(stop, end):
                    yield parameter, bucket.grad_data[max(start, first) : min(stop, end)]


def _counts_here(parameter: nn.Parameter) -> bool:
    return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
        parameter,
        tp_group=mpu.get_tensor_model_parallel_group(),
        expert_tp_group=mpu.get_expert_tensor_parallel_group(),
    )
