"""Rules that attention computes what the flags of its masks say: windows and documents."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.enums import AttnBackend

from megatron_periln.rules import Check, Rule

__all__ = ["MASKS"]


def _attends_locally(args: Namespace) -> bool:
    return bool(args.transformer_impl == "local" or args.attention_backend == AttnBackend.local)


def _masks_documents(args: Namespace) -> bool:
    return bool(args.reset_attention_mask and not args.dataloader_inter_document_masking)


def _window(args: Namespace) -> Iterator[str]:
    if args.window_size is None:
        return
    given = ",".join(map(str, args.window_size))
    if len(args.window_size) != 2 or min(args.window_size) < -1:
        yield (
            f"--window-size {given}: give how many tokens before and after its own a token sees, such as "
            "127,0; -1 for all"
        )
    elif args.window_size[1] > 0:
        yield (
            f"--window-size {given}: attention is causal, and sees no later token; "
            f"give {args.window_size[0]},0"
        )
    pattern = args.window_attn_skip_freq
    if isinstance(pattern, list) and args.num_layers and len(pattern) != args.num_layers:
        yield (
            f"--window-attn-skip-freq has {len(pattern)} entries and the model {args.num_layers} layers; "
            "give one for each layer"
        )


def _states_across_documents(args: Namespace) -> Iterator[str]:
    """Find layers that read no mask: their state passes from one document to the next."""
    if not _masks_documents(args):
        return
    carrying = sorted({Symbols.MAMBA, Symbols.GDN} & set(args.hybrid_layer_pattern or ""))
    if args.experimental_attention_variant == "gated_delta_net":
        carrying.append("gated_delta_net")
    if carrying:
        yield (
            f"--reset-attention-mask: layers of {' and '.join(carrying)} read no mask, and carry their state "
            "from one document to the next; give --dataloader-inter-document-masking, which they heed, or "
            "drop it"
        )
        args.reset_attention_mask = False


MASKS: tuple[Check, ...] = (
    _states_across_documents,
    Rule(
        lambda args: args.window_attn_skip_freq is not None and args.window_size is None,
        "--window-attn-skip-freq says which layers have a window: give --window-size too",
    ),
    _window,
    Rule(
        lambda args: args.dataloader_inter_document_masking and _attends_locally(args),
        "--dataloader-inter-document-masking packs documents as only Transformer Engine's attention "
        "reads them; use --reset-attention-mask with local attention",
        {"dataloader_inter_document_masking": False},
    ),
    Rule(
        lambda args: _masks_documents(args) and not args.create_attention_mask_in_dataloader,
        "--reset-attention-mask changes the mask that --no-create-attention-mask-in-dataloader leaves "
        "out; drop one of them",
    ),
    Rule(
        lambda args: _masks_documents(args) and not _attends_locally(args),
        "--reset-attention-mask has no effect on Transformer Engine's causal attention, which reads no "
        "mask; use --dataloader-inter-document-masking, or --transformer-impl local",
    ),
    Rule(
        lambda args: (
            _masks_documents(args)
            and _attends_locally(args)
            and args.masked_softmax_fusion
            and (args.bf16 or args.fp16)
        ),
        "--reset-attention-mask has no effect on the fused softmax, whose mask is causal and no other; "
        "add --no-masked-softmax-fusion",
    ),
)
"""What attention would not see, or see too much."""
