"""The health of the GPUs and of what connects them, as ``nvidia-smi`` and the kernel's log tell it."""

from __future__ import annotations

import os
import re
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from typing import Literal
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from megatron_periln.doctor.rows import Row
from megatron_periln.doctor.software import Answers
from megatron_periln.doctor.timeouts import run_within

__all__ = ["check_gpus", "check_kernel_log"]

_RESET = "drain the node and reset the GPU"
_REPLACE = "drain the node and have the GPU replaced"
_COOL = "look after the node's cooling and power: the slowest GPU sets the pace of all"

_FAULTS: tuple[tuple[str, Literal["warning", "failed"], str, str], ...] = (
    (r"ecc_errors/volatile/.*uncorrectable.*", "failed", "uncorrectable ECC errors", _RESET),
    (r"ecc_errors/aggregate/sram_threshold_exceeded", "failed", "too many SRAM errors in its life", _REPLACE),
    (r"remapped_rows/remapped_row_pending", "failed", "a memory row waits to be remapped", _RESET),
    (r"remapped_rows/remapped_row_failure", "failed", "a memory row could not be remapped", _REPLACE),
    (r"retired_pages/pending_retirement", "failed", "a memory page waits to be retired", _RESET),
    (r"gpu_recovery_action", "failed", "asks for recovery", _RESET),
    (
        r"clocks_\w+_reasons/.*_(hw_slowdown|hw_thermal_slowdown|hw_power_brake_slowdown|sw_thermal_slowdown)",
        "warning",
        "is throttled",
        _COOL,
    ),
)
"""Path below <gpu> in ``nvidia-smi -q -x``, what a value other than `_HEALTHY` there means, what to do."""

_HEALTHY = {"0", "no", "none", "n/a", "not active", "[n/a]", "not supported", ""}

_IN_USE_MIB = 1024

# Of Xid errors those that tell of the hardware, not of a program; docs.nvidia.com/deploy/xid-errors.
_HARDWARE_XIDS = {48, 61, 62, 63, 64, 74, 79, 92, 94, 95, 110, 119, 120, 121, 136, 140, 143, 149, 154}


def check_gpus(options: Namespace, answers: Answers) -> Iterator[Row]:
    """Count the GPUs; look for errors, throttling, other processes, and broken links."""
    if shutil.which("nvidia-smi") is None:
        works = "version" in answers.get("CUDA", {})
        yield Row(
            "GPU health",
            "warning" if works else "failed",
            "nvidia-smi is not there",
            "install the driver's tools, or pass them into the container (docker run --gpus all)",
        )
        return
    done = run_within(["nvidia-smi", "-q", "-x"], options.timeout)
    try:
        log = ElementTree.fromstring(done.stdout)
    except ElementTree.ParseError:
        said = " ".join((done.stdout + done.stderr).split())[-200:] or f"exit status {done.returncode}"
        yield Row("GPU health", "failed", f"nvidia-smi: {said}", "drain the node")
        return
    gpus = log.findall("gpu")
    yield _count_row(log, gpus, answers)
    if not gpus:
        return
    faults = [row for index, gpu in enumerate(gpus) for row in _faults(index, gpu)]
    yield from faults or [Row("GPU health", "ok", "no memory errors, no throttling")]
    yield from _nvlink_rows(run_within(["nvidia-smi", "nvlink", "--status"], options.timeout).stdout)
    yield from _topology_rows(run_within(["nvidia-smi", "topo", "-m"], options.timeout).stdout, len(gpus))


def _count_row(log: Element, gpus: list[Element], answers: Answers) -> Row:
    names = Counter(gpu.findtext("product_name", "unknown") for gpu in gpus)
    value = ", ".join(f"{count} x {name}" for name, count in names.items()) or "none"
    value += f", driver {log.findtext('driver_version', 'unknown')}"
    promises = {
        name: int(os.environ[name])
        for name in ("LOCAL_WORLD_SIZE", "SLURM_GPUS_ON_NODE")
        if os.environ.get(name, "").isdigit()
    }
    visible = answers.get("CUDA", {}).get("gpus", len(gpus))
    for name, promised in {"nvidia-smi": min(1, len(gpus)), **promises}.items():
        if visible < promised:
            return Row(
                "GPU count",
                "failed",
                f"{value}; torch sees {visible}, but {name} says {promised}",
                "see CUDA_VISIBLE_DEVICES, and what nvidia-smi lacks",
            )
    if not gpus:
        return Row("GPU count", "failed", value, "drain the node, or give --device cpu")
    if len(names) > 1:
        return Row("GPU count", "warning", value, "the slowest GPU sets the pace of all")
    return Row("GPU count", "ok", value)


def _leaves(element: Element, path: str = "") -> Iterator[tuple[str, str]]:
    for child in element:
        inner = f"{path}/{child.tag}" if path else child.tag
        if len(child):
            yield from _leaves(child, inner)
        else:
            yield inner, (child.text or "").strip()


def _faults(index: int, gpu: Element) -> Iterator[Row]:
    where = f"GPU {index} ({gpu.get('id', 'unknown bus')})"
    for path, value in _leaves(gpu):
        for pattern, status, meaning, advice in _FAULTS:
            if value.lower() not in _HEALTHY and re.fullmatch(pattern, path):
                yield Row("GPU health", status, f"{where} {meaning}: {path.split('/')[-1]} {value}", advice)
    used = re.match(r"\d+", gpu.findtext("fb_memory_usage/used", ""))
    if used and int(used[0]) > _IN_USE_MIB:
        yield Row(
            "GPU memory",
            "warning",
            f"{where}: {used[0]} MiB in use by others",
            "end what an earlier job left behind: nvidia-smi lists it",
        )


def _nvlink_rows(status: str) -> Iterator[Row]:
    """Compare the GPUs' links: some GPUs have links that are inactive on all alike."""
    up = [
        re.findall(r"Link \d+: ([\d.]+ GB/s)", part)
        for part in re.split(r"^GPU \d+:", status, flags=re.MULTILINE)[1:]
    ]
    counts = [sum(not link.startswith("0 ") for link in links) for links in up]
    if not any(counts):
        yield Row("NVLink", "ok", "none")
    elif len(set(counts)) > 1:
        yield Row("NVLink", "failed", f"links up on each GPU: {', '.join(map(str, counts))}", _RESET)
    else:
        yield Row("NVLink", "ok", f"{counts[0]} links of {up[0][0]} on each GPU")


def _topology_rows(matrix: str, count: int) -> Iterator[Row]:
    kinds: set[str] = set()
    for line in matrix.splitlines():
        words = line.split()
        if len(words) > count and re.fullmatch(r"GPU\d+", words[0]) and "X" in words[1 : count + 1]:
            kinds.update(word for word in words[1 : count + 1] if word != "X")
    if not kinds:
        return
    linked = {kind for kind in kinds if kind.startswith("NV")}
    value = f"{', '.join(sorted(kinds))} between GPUs"
    if linked and linked != kinds:
        yield Row(
            "topology", "warning", value, "some pairs have no NVLink: keep tensor parallelism within those"
        )
    else:
        yield Row("topology", "ok", value)


def check_kernel_log(options: Namespace) -> Iterator[Row]:
    """Look for Xid errors of the hardware since the node was started."""
    if shutil.which("dmesg") is None:
        return
    done = run_within(["dmesg"], options.timeout)
    if done.returncode:
        yield Row("Xid errors", "ok", "unknown: the kernel's log can't be read here")
        return
    found = Counter(map(int, re.findall(r"NVRM: Xid \([^)]*\): (\d+)", done.stdout)))
    hardware = {xid: found[xid] for xid in sorted(_HARDWARE_XIDS & set(found))}
    if hardware:
        value = ", ".join(f"{xid} ({times} times)" for xid, times in hardware.items())
        yield Row("Xid errors", "warning", value, "look them up, and reset the GPU or drain the node")
    else:
        yield Row("Xid errors", "ok", "none of the hardware since the node was started")
