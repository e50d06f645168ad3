"""One forward step of GPT pretraining: batch, model, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    StragglerDetector,
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import is_first_or_last_pipeline_stage, print_rank_0
from torch import Tensor

from megatron_periln.models.residual_adds import check_calls
from megatron_periln.training.datasets.gpt_datasets import masks_documents, predicts_more_tokens_here
from megatron_periln.training.optimizers.emerging import describe_shares

__all__ = ["forward_step", "loss_function"]

Batch = dict[str, Tensor | None]
Loss = tuple[Tensor, Tensor, dict[str, Tensor]]

_FIELDS = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
)
# A loss this many times the largest seen is reported by --check-for-spiky-loss, as in Megatron-LM.
_SPIKE_FACTOR = 10

_straggler_detector = StragglerDetector()


def _batch(data_iterator: Iterator[Any] | None, vp_stage: int | None, *, training: bool) -> Batch:
    """Return this rank's part of the next batch; every field is None on stages that need none."""
    args = get_args()
    batch: Batch = dict.fromkeys(_FIELDS)
    predicts_more = predicts_more_tokens_here(args, vp_stage)
    packs_documents = args.dataloader_inter_document_masking
    if not (is_first_or_last_pipeline_stage(vp_stage) or predicts_more or masks_documents(args)):
        return batch
    tensor_rank = mpu.get_tensor_model_parallel_rank()
    if tensor_rank == 0:
        assert data_iterator is not None
        loaded = next(data_iterator)
        batch = {name: loaded[name].cuda(non_blocking=True) if name in loaded else None for name in _FIELDS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packs_documents,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tensor_rank,
        micro_batch_size=args.micro_batch_size if training else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts_more,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        # Upstream leaves the mask out on stages between the first and the last.
        is_pipeline_last_stage=mpu.is_pipeline_last_stage() or args.reset_attention_mask,
    )
    batch = flatten_batch_for_packed_sequences(batch)
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=packs_documents,
    )


def _packed_sequences(batch: Batch, micro_batch_size: int) -> PackedSeqParams | None:
    """Describe the documents within a packed batch, for layers that must not cross them."""
    args = get_args()
    mamba = Symbols.MAMBA in (args.hybrid_layer_pattern or "")
    lengths, longest = batch["cu_seqlens"], batch["max_seqlen"]
    if lengths is None or longest is None:
        return None
    lengths = lengths.squeeze(0)
    update_seqlen_stats_from_cu_seqlens(lengths)
    padded = batch["cu_seqlens_padded"]
    padded = None if padded is None else padded.squeeze(0)
    bounds = lengths if padded is None else padded
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=int(longest.item()),
        max_seqlen_kv=int(longest.item()),
        tokens_per_sample=args.seq_length,
        # By which Mamba layers start anew with each document; attention and gated delta nets take the bounds.
        total_tokens=micro_batch_size * args.seq_length if mamba else None,
    )


def loss_function(loss_mask: Tensor, losses: Tensor) -> Loss:
    """Sum the losses of the tokens that count.

    Parameters
    ----------
    loss_mask
        ``[batch, sequence]``; 1 where a token counts, 0 where not.
    losses
        Cross entropy per token in nats, ``[batch, sequence]``.

    Returns
    -------
    tuple
        The summed loss, the number of tokens that count, and both for Megatron's ``lm loss``.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    _validate(loss.detach().clone())  # for later: pipelines free the loss itself
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.to(loss.dtype)])}


def _validate(loss: Tensor) -> None:
    args, rerun = get_args(), get_rerun_state_machine()
    checks: list[tuple[bool, Callable[..., Any], str, bool]] = [
        (
            args.check_for_nan_in_loss_and_grad,
            torch.isnan,
            "found NaN in local forward loss calculation",
            True,
        ),
        (
            args.check_for_nan_in_loss_and_grad,
            torch.isinf,
            "found Inf in local forward loss calculation",
            True,
        ),
        (
            args.check_for_spiky_loss,
            partial(rerun.is_unexpectedly_large, threshold=_SPIKE_FACTOR, context="loss"),
            "Spiky loss",
            False,
        ),
    ]
    for wanted, rejects, message, fatal in checks:
        if wanted:
            rerun.validate_result(
                result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=fatal
            )


def forward_step(
    data_iterator: Iterator[Any] | None, model: GPTModel, return_schedule_plan: bool = False
) -> tuple[Any, Callable[[Tensor], Loss]]:
    """Run the model on the next batch; Megatron's ``forward_step_func``.

    Parameters
    ----------
    data_iterator
        Read on the first rank of each tensor-parallel group.
    model
        The pipeline stage, wrapped as Megatron wraps it.
    return_schedule_plan
        Return the plan of ``--overlap-moe-expert-parallel-comm`` instead of the output.

    Returns
    -------
    tuple
        The stage's output, and the function that turns the last stage's output into the loss.

    Raises
    ------
    UsageError
        After the first forward pass, if a layer went round a norm that stands at its residual add.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _straggler_detector(bdata=True):
        batch = _batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"), training=model.training)
        args = get_args()
        packed = _packed_sequences(
            batch, args.micro_batch_size if model.training else args.eval_micro_batch_size
        )
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    loss_mask: Any = batch["loss_mask"]
    targets = {"labels": batch["labels"], "loss_mask": loss_mask}
    with _straggler_detector:
        if return_schedule_plan:
            output = model.build_schedule_plan(*inputs, **targets)
        else:
            output = model(*inputs, **targets, packed_seq_params=packed)
            check_calls(model)
    for line in describe_shares(args, model):
        print_rank_0(line)
    return output, partial(loss_function, loss_mask)
