"""cuDNN, in which Transformer Engine's attention runs: tried before training where versions say it fails.

What cuDNN refuses while training ends in one line, too, with the versions.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.transformer.enums import AttnBackend

from megatron_periln import cpu
from megatron_periln.checkpoints.rendezvous import Rendezvous
from megatron_periln.cudnn import (
    choose_attention,
    dotted,
    find_cudnn_mismatch,
    running_cudnn,
    transformer_engine_version,
)
from megatron_periln.errors import TRACEBACK, RankError, UsageError

__all__ = ["cudnn_in_one_line", "refuse_old_cudnn"]

_OTHERS = (AttnBackend.flash, AttnBackend.unfused, AttnBackend.local)
"""What ``--attention-backend`` may take in place of cuDNN."""


def refuse_old_cudnn(args: Namespace) -> None:
    """Refuse a cuDNN that is too old for Transformer Engine's attention, if attention fails with it.

    Parameters
    ----------
    args
        Megatron's, validated.

    Raises
    ------
    UsageError
        With both versions, and what to install.
    """
    if cpu.is_active() or args.transformer_impl != "transformer_engine" or args.attention_backend in _OTHERS:
        return
    if args.params_dtype == torch.float32 or (mismatch := find_cudnn_mismatch()) is None:
        return
    # Versions are not all: flash-attn may be there, and be taken.
    choose_attention(args.attention_backend.name)
    device = torch.device("cuda", args.local_rank % torch.cuda.device_count())
    if failure := attention_failure(device, args.params_dtype):
        _refuse(args, f"{mismatch.what} ({failure}); {mismatch.remedy}")


def attention_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return how a small causal attention of Transformer Engine's fails, None if it goes both ways."""
    import transformer_engine.pytorch as te  # after torch; a second, which only this needs

    try:
        query, key, value = (
            torch.randn(64, 1, 2, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        )
        attention = te.DotProductAttention(2, 64, attention_dropout=0.0)
        with torch.cuda.device(device):
            attention(query, key, value).sum().backward()
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {_short(error)}"
    return None


@contextmanager
def cudnn_in_one_line(args: Namespace) -> Iterator[None]:
    """Turn what cuDNN refuses meanwhile into a `UsageError` with the versions and what to do.

    Raises
    ------
    UsageError
        Of one rank, if only some have met the error.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("cuDNN Error", "CUDNN_STATUS", "cuDNN error")):
            raise
        _refuse(args, _explain(_short(error)), error)


def _short(error: Exception) -> str:
    """Return what an error says, in one line: without where in the library, and what to set to know more."""
    text = " ".join(str(error).split())
    text = text[max(0, text.find("cuDNN Error")) :]
    return text.partition(" For more information")[0][:200]


def _explain(text: str) -> str:
    mismatch = find_cudnn_mismatch()
    if mismatch is not None:
        return f"{mismatch.what} ({text}); {mismatch.remedy}"
    cudnn = running_cudnn()
    return (
        f"cuDNN {dotted(cudnn) if cudnn else ''} refuses a call ({transformer_engine_version()}, torch "
        f"{torch.__version__}): {text}; CUDNN_LOGERR_DBG=1 CUDNN_LOGDEST_DBG=stderr tell more, "
        f"{TRACEBACK}=1 shows where, and --attention-backend unfused does without cuDNN's attention"
    )


def _refuse(args: Namespace, message: str, cause: BaseException | None = None) -> None:
    alone = Rendezvous(args).speaks_for_the_first()
    if alone:
        raise RankError(f"rank {args.rank}: {message}") from cause
    raise UsageError(message) from cause
