"""Checks that attention computes what the flags of its masks say: windows and documents."""

from __future__ import annotations

from argparse import Namespace

from megatron.core.transformer.enums import AttnBackend

from megatron_periln.errors import UsageError

__all__ = ["check_masks"]


def check_masks(args: Namespace) -> None:
    """Check ``--window-size``, and that the attention that was chosen reads the mask of documents.

    Raises
    ------
    UsageError
        If attention would see other tokens than the flags say, or fail.
    """
    _check_window(args)
    if args.dataloader_inter_document_masking:
        if _attends_locally(args):
            raise UsageError(
                "--dataloader-inter-document-masking packs documents as only Transformer Engine's attention "
                "reads them; use --reset-attention-mask with local attention"
            )
    elif args.reset_attention_mask:
        _check_document_mask(args)


def _check_window(args: Namespace) -> None:
    pattern = args.window_attn_skip_freq
    if args.window_size is None:
        if pattern is not None:
            raise UsageError(
                "--window-attn-skip-freq says which layers have a window: give --window-size too"
            )
        return
    given = ",".join(map(str, args.window_size))
    if len(args.window_size) != 2 or min(args.window_size) < -1:
        raise UsageError(
            f"--window-size {given}: give how many tokens before and after its own a token sees, such as "
            "127,0; -1 for all"
        )
    if args.window_size[1] > 0:
        raise UsageError(
            f"--window-size {given}: attention is causal, and sees no later token; "
            f"give {args.window_size[0]},0"
        )
    if isinstance(pattern, list) and args.num_layers and len(pattern) != args.num_layers:
        raise UsageError(
            f"--window-attn-skip-freq has {len(pattern)} entries and the model {args.num_layers} layers; "
            "give one for each layer"
        )


def _attends_locally(args: Namespace) -> bool:
    return bool(args.transformer_impl == "local" or args.attention_backend == AttnBackend.local)


def _check_document_mask(args: Namespace) -> None:
    if not args.create_attention_mask_in_dataloader:
        raise UsageError(
            "--reset-attention-mask changes the mask that --no-create-attention-mask-in-dataloader leaves "
            "out; drop one of them"
        )
    if not _attends_locally(args):
        raise UsageError(
            "--reset-attention-mask has no effect on Transformer Engine's causal attention, which reads no "
            "mask; use --dataloader-inter-document-masking, or --transformer-impl local"
        )
    if args.masked_softmax_fusion and (args.bf16 or args.fp16):
        raise UsageError(
            "--reset-attention-mask has no effect on the fused softmax, whose mask is causal and no other; "
            "add --no-masked-softmax-fusion"
        )
