"""Where and with what a benchmark ran."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_periln.studies.provenance import versions

__all__ = ["command", "machine"]

_PACKAGES = (
    "megatron-periln",
    "megatron-core",
    "torch",
    "triton",
    "transformer-engine",
    "numpy",
    "gigatoken",
    "tokenizers",
    "transformers",
    "sentencepiece",
    "tiktoken",
)


def command() -> str:
    """Return the command line of this process."""
    return shlex.join(["python", *sys.argv])


def machine(packages: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the device, date and versions: of Python, what is installed here, and ``packages``."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "gpu": _gpu(),
        "system": platform.platform(),
        "load_average_at_start": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions(_PACKAGES), **(packages or {})},
    }


def _gpu() -> str | None:
    """Return the name of the GPU, if this process uses one."""
    torch = sys.modules.get("torch")
    if torch is None or torch.version.cuda is None or not torch.accelerator.is_available():
        return None
    return str(torch.cuda.get_device_name())
