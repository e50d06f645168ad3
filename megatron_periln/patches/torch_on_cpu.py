"""What is changed in torch to run Megatron on the CPU, beside what ``"cuda"`` means (megatron_periln/cpu)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroupGloo, distributed_c10d

from megatron_periln.patches.registry import changes
from megatron_periln.patches.starting.late_imports import step_without_dynamo

__all__ = [
    "compile_nothing",
    "exchange_parts_of_any_size",
    "install",
    "keep_data_loaders_off_the_device_generator",
    "share_the_devices_of_gloo",
    "sum_embedding_gradients_in_fp32",
    "sum_layer_norm_gradients_in_fp32",
]

_ROUGH = (torch.bfloat16, torch.float16)


def install() -> None:
    """Install it, before megatron is imported."""
    compile_nothing()
    step_without_dynamo()
    keep_data_loaders_off_the_device_generator()
    sum_layer_norm_gradients_in_fp32()
    sum_embedding_gradients_in_fp32()
    exchange_parts_of_any_size()
    share_the_devices_of_gloo()


@changes(
    "torch.compile",
    why="Megatron decorates functions with it while it is being imported (megatron/core/jit.py, "
    "moe/router.py), before any flag could say otherwise; compiling them would need a C++ "
    "toolchain and minutes for what runs in milliseconds",
    until="patches/test_torch_on_cpu.py::test_upstream_still_compiles_while_being_imported",
)
def compile_nothing() -> None:
    """Let ``torch.compile`` return its argument."""

    def compile(model: Any = None, **_: Any) -> Any:
        return (lambda function: function) if model is None else model

    torch.compile = compile


@changes(
    "torch.utils.data.DataLoader.__init__",
    why="a loader draws a seed from the CPU's generator whenever it is iterated. Here that generator "
    "is the device's too, which Megatron restores before it builds its loaders: the draw would "
    "change what dropout does after a resume",
    until="patches/test_torch_on_cpu.py::test_upstream_still_draws_from_the_cpu_generator_in_data_loaders",
)
def keep_data_loaders_off_the_device_generator() -> None:
    """Give each data loader a generator of its own."""
    init = torch.utils.data.DataLoader.__init__

    def with_own_generator(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("generator") is None:
            kwargs["generator"] = torch.Generator().manual_seed(torch.initial_seed())
        init(self, *args, **kwargs)

    torch.utils.data.DataLoader.__init__ = with_own_generator  # type: ignore[method-assign]


@changes(
    "torch.nn.functional.layer_norm",
    why="on the CPU it sums the gradients of its weight and bias over the rows in the dtype of the inputs: "
    "in bf16 they are 16 % off at 16k rows, and more at more. `rms_norm` sums in fp32, as both do on a GPU",
    until="patches/test_torch_on_cpu.py::test_upstream_still_sums_gradients_of_layer_norm_in_bf16",
)
def sum_layer_norm_gradients_in_fp32() -> None:
    """Let LayerNorm of bf16 and fp16 compute in fp32, and round its results once."""
    layer_norm = F.layer_norm

    def in_fp32(
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        shape = list(normalized_shape)
        if input.dtype not in _ROUGH:
            return layer_norm(input, shape, weight, bias, eps)
        weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
        return layer_norm(input.float(), shape, weight, bias, eps).to(input.dtype)

    F.layer_norm = in_fp32


@changes(
    "torch.nn.functional.embedding",
    why="on the CPU it sums the gradient of a row over the tokens that read it in the dtype of the weights: "
    "in bf16 it is 4 % off for a row that 1024 tokens read. `index_select` sums in fp32, as both do on a GPU",
    until="patches/test_torch_on_cpu.py::test_upstream_still_sums_gradients_of_embeddings_in_bf16",
)
def sum_embedding_gradients_in_fp32() -> None:
    """Let embeddings in bf16 and fp16 be read by ``index_select``."""
    embedding = F.embedding

    def by_index_select(
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        plain = padding_idx is None and max_norm is None and not (scale_grad_by_freq or sparse)
        if weight.dtype in _ROUGH and plain:
            return weight.index_select(0, input.flatten()).view(*input.shape, weight.size(1))
        return embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)

    F.embedding = by_index_select


@changes(
    "torch.distributed.all_gather",
    "torch.distributed.reduce_scatter",
    why="gloo's take parts of one size; NCCL's groups send parts of several sizes one by one, and sharded "
    "experts have such (--expert-tensor-parallel-size beside --expert-model-parallel-size), for each rank "
    "routes its own number of tokens to them",
    until="patches/test_torch_on_cpu.py::test_upstream_still_gathers_parts_of_one_size",
)
def exchange_parts_of_any_size() -> None:
    """Broadcast parts of several sizes one by one, and reduce them one by one."""
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if async_op or _of_one_size(tensor_list):
            return all_gather(tensor_list, tensor, group, async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for rank, part in enumerate(tensor_list):
            if part.numel():
                dist.broadcast(part, group=group, group_src=rank)
        return None

    def scatter(
        output: Tensor,
        input_list: list[Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if async_op or _of_one_size(input_list):
            return reduce_scatter(output, input_list, op, group, async_op)
        for rank, part in enumerate(input_list):
            if part.numel():
                sums = part.clone()
                dist.reduce(sums, op=op, group=group, group_dst=rank)
                if rank == dist.get_rank(group):
                    output.copy_(sums)
        return None

    dist.all_gather, dist.reduce_scatter = gather, scatter


def _of_one_size(parts: list[Tensor]) -> bool:
    return all(part.shape == parts[0].shape for part in parts)


@changes(
    "torch.distributed.distributed_c10d._create_gloo_process_group",
    why="each process group has a device of its own, whose thread wakes 100 times a second to look for "
    "messages, and Megatron makes 24 groups in each rank: up to a tenth of a small model's CPU time",
    until="patches/test_torch_on_cpu.py::test_upstream_still_has_a_device_for_each_group",
)
def share_the_devices_of_gloo() -> None:
    """Let all groups of a process use the devices of its first one."""
    create = distributed_c10d._create_gloo_process_group
    of_process: dict[int, Any] = {}

    def on_shared_devices(opts: Any, backend_options: Any) -> Any:
        if (first := of_process.get(os.getpid())) is None:  # their threads stay behind in a fork
            group = create(opts, backend_options)
            of_process[os.getpid()] = group.options
            return group
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices, options._threads = first._devices, first._threads
        options._timeout, options.enable_reconfigure = opts.timeout, opts.enable_reconfigure
        group = ProcessGroupGloo(opts.store, opts.group_rank, opts.group_size, options)
        group.options.global_ranks_in_group = opts.global_ranks_in_group
        group.options.group_name = opts.group_id
        return group

    distributed_c10d._create_gloo_process_group = on_shared_devices
