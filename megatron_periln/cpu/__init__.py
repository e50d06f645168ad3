"""Megatron on the CPU: ``"cuda"`` means the CPU, NCCL means gloo.

Megatron's training loop, parallelism, optimizers and checkpoints run as they are, in fp32 and
bf16, in any layout, without a GPU. Knows nothing of norms.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_periln.cpu import cuda_surface, device_alias, state_spaces
from megatron_periln.patches import torch_on_cpu

__all__ = ["activate", "is_active", "judging_for_gpus"]

_active = _judging_for_gpus = False


def is_active() -> bool:
    """Tell whether the CPU stands in for the GPU in this process."""
    return _active and not _judging_for_gpus


@contextmanager
def judging_for_gpus() -> Iterator[None]:
    """Have flags judged and checked as where there are GPUs: for a run that isn't one of this process."""
    global _judging_for_gpus
    before, _judging_for_gpus = _judging_for_gpus, True
    try:
        yield
    finally:
        _judging_for_gpus = before


def activate(*, hide_gpu: bool = False) -> None:
    """Let the CPU stand in for the GPU, in this process and for good.

    Parameters
    ----------
    hide_gpu
        Allow it on a machine whose GPU would be hidden.

    Raises
    ------
    RuntimeError
        If megatron is imported already, or if there is a GPU and ``hide_gpu`` is False.
    """
    global _active
    if _active:
        return
    if any(name.split(".")[0] == "megatron" for name in sys.modules):
        raise RuntimeError("the CPU can stand in for the GPU only before megatron is imported")
    if torch.cuda.is_available() and not hide_gpu:
        raise RuntimeError(
            "this machine has a GPU, and --device cpu would hide it; drop --device cpu to use the GPU, "
            "or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU all the same"
        )
    # Megatron asks for this setting, which orders kernels on a GPU, whenever ranks communicate.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cuda_surface.install()
    device_alias.install()
    torch_on_cpu.install()
    _active = True
    from megatron_periln.patches import megatron_on_cpu  # imports megatron, to which all above must be there

    megatron_on_cpu.install()
    state_spaces.install()
