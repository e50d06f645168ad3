"""One rank's model, built without memory as Megatron trains it, and one microbatch through each chunk."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.utils import unwrap_model
from megatron.training import training
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_periln.plan.model.storages import Storages, on_call
from megatron_periln.training.run import model_config_of

__all__ = ["ACTIVATIONS", "LOGITS", "WORKING", "Pass", "build_chunks", "run_chunk", "without_memory"]

ACTIVATIONS, LOGITS, WORKING = "activations", "logits and loss", "working memory"


@contextmanager
def without_memory() -> Iterator[None]:
    """Have tensors that are made here take none."""
    with (
        warnings.catch_warnings(),
        mock.patch.object(torch.nn.Module, "_apply", _apply),
        # It compares states, and fake tensors have no numbers.
        mock.patch.object(CudaRNGStatesTracker, "fork", lambda *_, **__: nullcontext()),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        warnings.simplefilter("ignore")
        yield


def _apply(module: torch.nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Convert a module's tensors; ``torch.nn.Module._apply`` swaps tensors, which fake ones can't be."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            changed = function(parameter)
        if changed.dtype != parameter.dtype:
            changed = torch.nn.Parameter(changed, parameter.requires_grad)
            vars(changed).update(vars(parameter))  # Megatron's tags
            module._parameters[name] = changed
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def build_chunks(args: Namespace) -> list[Any]:
    """Return the model of this rank as Megatron trains it: a chunk a virtual stage, each in its DDP.

    Within `without_memory` and `fake_rank`.
    """
    configuration = model_config_of(args)
    builder = configuration.get_builder_cls()(configuration)

    def provide(
        pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **given: Any
    ) -> Any:
        return builder.build_model(given["pg_collection"], pre_process, post_process, vp_stage)

    chunks: list[Any] = training.get_model(provide, ModelType.encoder_or_decoder)
    return chunks


@dataclass(frozen=True)
class Pass:
    """One microbatch through one chunk, forward and backward.

    Attributes
    ----------
    saved
        Bytes, by kind, that are held between the two for the second.
    forward, backward
        Bytes, by kind, that are held when most is held meanwhile; `saved` among them.
    left
        Bytes that stay after both, such as buffers for gathered sequences.
    """

    saved: Counter[str]
    forward: Counter[str]
    backward: Counter[str]
    left: int


def _inputs(args: Namespace, model: Any) -> dict[str, Tensor | None]:
    length, batch = args.seq_length // args.context_parallel_size, args.micro_batch_size
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    mask = None
    if args.create_attention_mask_in_dataloader and (
        args.device == "cpu" or args.transformer_impl == "local"
    ):
        mask = torch.zeros(batch, 1, length, args.seq_length, dtype=torch.bool)
    if not (model.pre_process or model.post_process or getattr(model, "mtp_process", False)):
        return {"input_ids": None, "position_ids": None, "attention_mask": mask, "labels": None}
    return {
        "input_ids": tokens,
        "position_ids": tokens.clone(),
        "attention_mask": mask,
        "labels": tokens.clone(),
    }


def _stage_input(args: Namespace) -> Tensor:
    length = args.seq_length // args.context_parallel_size
    if args.sequence_parallel:
        length //= args.tensor_model_parallel_size
    dtype = torch.float32 if args.fp32_residual_connection else args.params_dtype
    return torch.empty(length, args.micro_batch_size, args.hidden_size, dtype=dtype, requires_grad=True)


def run_chunk(args: Namespace, chunk: Any) -> Pass:
    """Run one microbatch through a chunk as a pipeline stage does; within `without_memory` and `fake_rank`.

    The loss is that of every token.
    """
    model, log = unwrap_model(chunk), Storages()
    log.known(_owned(chunk))
    hooks = _kinds(model, log)
    # Nothing is sent meanwhile: what collectives take besides is not a microbatch's.
    with log.watching(), chunk.no_sync():
        log.kind = ACTIVATIONS
        inputs = _inputs(args, model)
        if not model.pre_process:
            model.set_input_tensor([_stage_input(args)])
        output = chunk(**inputs)
        if model.post_process:
            log.kind = LOGITS
            output = output.float().sum()
        else:
            deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
        del inputs
        middle = log.now
        log.kind = WORKING
        if model.post_process:
            output.backward()
        else:
            custom_backward(output, _stage_input(args).detach())
        end = log.now
        if not model.pre_process:
            model.set_input_tensor([None])
        del output
    for hook in hooks:
        hook.remove()
    left = log.held(log.now)
    return Pass(
        saved=log.by_kind(middle, but=left),
        forward=log.by_kind(log.peak(0, middle, but=left), but=left),
        backward=log.by_kind(log.peak(middle, end, but=left), but=left),
        left=sum(log.by_kind(log.now).values()),
    )


def _kinds(model: Any, log: Storages) -> list[Any]:
    """Have the log tell what the output layer and the loss make from what the layers do."""

    def now(kind: str) -> None:
        if log.kind in (ACTIVATIONS, LOGITS):  # not while recomputing
            log.kind = kind

    if not model.post_process:
        return []
    return on_call([model.output_layer], partial(now, LOGITS))


def _owned(chunk: Any) -> Iterator[Tensor]:
    """Yield the tensors that are there before a microbatch."""
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        yield from (tensor for tensor in (buffer.param_data, buffer.grad_data) if tensor is not None)
    model = unwrap_model(chunk)
    yield from model.parameters()
    yield from model.buffers()
