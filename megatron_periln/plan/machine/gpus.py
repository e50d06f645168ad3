"""GPUs as data: the memory that a process finds, how fast they compute and send, and what is set aside."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from megatron_periln.errors import UsageError

__all__ = ["ALLOWANCES", "GIB", "GPUS", "Allowance", "Gpu", "gpu_named"]

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A GPU, or one of whose memory alone is known.

    Attributes
    ----------
    name
        As ``--gpu`` takes it.
    memory
        Bytes that a process finds, which are fewer than the name says: ``torch.cuda.mem_get_info()[1]``.
    bf16, fp8
        Dense matrix products, FLOP/s; None if it has none, or if they are not known.
    nvlink
        Bytes/s that it sends over NVLink, one way.
    network
        Bytes/s that it sends to other nodes with one adapter a GPU, as NVIDIA's own systems have; one way.
    node
        GPUs of a node, or of an NVLink domain.
    source
        Where the numbers are from.
    """

    name: str
    memory: int
    bf16: float | None = None
    fp8: float | None = None
    nvlink: float = 450e9
    network: float = 50e9
    node: int = 8
    source: str = ""

    def with_network(self, network: float) -> Gpu:
        """Return it with another bandwidth to other nodes."""
        return replace(self, network=network)


def _gpu(
    name: str, gib: float, bf16: float, fp8: float | None, nvlink: float, source: str, **more: int
) -> Gpu:
    return Gpu(
        name=name,
        memory=round(gib * GIB),
        bf16=bf16 * 1e12,
        fp8=fp8 and fp8 * 1e12,
        nvlink=nvlink * 1e9,
        network=more.get("network", 50) * 1e9,
        node=more.get("node", 8),
        source=source,
    )


_MEMORY = "memory: torch's OutOfMemoryError; the rest: NVIDIA's datasheet"

GPUS = {
    gpu.name: gpu
    for gpu in (
        #    name        GiB     bf16   fp8     NVLink
        _gpu("a100-40", 39.39, 312, None, 300, f"{_MEMORY} of A100 SXM", network=25),
        _gpu("a100-80", 79.14, 312, None, 300, f"{_MEMORY} of A100 SXM", network=25),
        _gpu("h100-80", 79.10, 989.4, 1978.9, 450, f"{_MEMORY} of H100 SXM, without sparsity"),
        _gpu("h200-141", 139.80, 989.4, 1978.9, 450, f"{_MEMORY} of H200 SXM, without sparsity"),
        _gpu("gh200-96", 94.50, 989.4, 1978.9, 450, f"{_MEMORY} of GH200; nodes of Alps", network=25, node=4),
        _gpu("b200-180", 178.35, 2250, 4500, 900, f"{_MEMORY} of DGX B200, without sparsity"),
        _gpu("gb200-186", 184.00, 2500, 5000, 900, f"{_MEMORY} of GB200 NVL72, without sparsity", node=72),
    )
}
"""By name."""


@dataclass(frozen=True)
class Allowance:
    """Memory that no tensor of the run takes.

    Attributes
    ----------
    name
        What takes it.
    each
        Bytes.
    of
        ``"process"``, ``"communicator"`` (of each group of several ranks) or ``"share"`` (of torch's memory).
    source
        Why that much.
    """

    name: str
    each: float
    of: str
    source: str


ALLOWANCES = (
    Allowance(
        "CUDA context",
        0.6 * GIB,
        "process",
        "an allowance: 0.5 GiB of context and loaded kernels on A100 and H100, and cuBLAS's workspaces",
    ),
    Allowance(
        "NCCL",
        0.3 * GIB,
        "communicator",
        "an allowance: NVIDIA/nccl#964 has 0.1 to 0.25 GiB beside the context for each of several groups "
        "on NVLink, NVIDIA/nccl#864 more than 1 GiB for some over a network",
    ),
    Allowance(
        "fragmentation",
        0.02,
        "share",
        "an allowance: what torch's allocator holds and can't give, with expandable segments",
    ),
)
"""What is added to a plan's tensors. None has been measured with this package: of the one GPU that it ran
on, allocated memory alone is known."""


def gpu_named(text: str) -> Gpu:
    """Return the GPU of a name, or one with so many GiB.

    Raises
    ------
    UsageError
        If it is neither.
    """
    name = text.strip().lower()
    if name in GPUS:
        return GPUS[name]
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib)?", name):
        if not 1 <= float(match[1]) <= 4096:
            raise UsageError(f"--gpu {text}: no GPU has so much memory; give GiB, such as 79.1")
        return Gpu(f"{float(match[1]):g} GiB", round(float(match[1]) * GIB), source="given")
    near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.5)
    raise UsageError(
        f"--gpu {text}: unknown"
        + "".join(f" (did you mean {each}?)" for each in near)
        + f"; give one of {', '.join(GPUS)}, or its memory in GiB"
    )
