"""Faults of GPUs, as a script that stands in for nvidia-smi tells them."""

from __future__ import annotations

import re

import pytest

GPU = """
<gpu id="00000000:{bus}:00.0">
  <product_name>NVIDIA H100 80GB HBM3</product_name>
  <ecc_errors>
    <volatile>
      <sram_correctable>3</sram_correctable>
      <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
      <sram_uncorrectable_secded>0</sram_uncorrectable_secded>
      <dram_correctable>1</dram_correctable>
      <dram_uncorrectable>0</dram_uncorrectable>
    </volatile>
    <aggregate>
      <dram_uncorrectable>2</dram_uncorrectable>
      <sram_threshold_exceeded>No</sram_threshold_exceeded>
    </aggregate>
  </ecc_errors>
  <retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
  <remapped_rows>
    <remapped_row_corr>0</remapped_row_corr>
    <remapped_row_unc>1</remapped_row_unc>
    <remapped_row_pending>No</remapped_row_pending>
    <remapped_row_failure>No</remapped_row_failure>
  </remapped_rows>
  <clocks_event_reasons>
    <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
    <clocks_event_reason_sw_power_cap>Not Active</clocks_event_reason_sw_power_cap>
    <clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown>
  </clocks_event_reasons>
  <fb_memory_usage><total>81559 MiB</total><used>4 MiB</used></fb_memory_usage>
  <gpu_recovery_action>None</gpu_recovery_action>
</gpu>"""

LOG = f"""<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
<driver_version>580.105.08</driver_version>
{GPU.format(bus="18")}
{GPU.format(bus="2A")}
</nvidia_smi_log>"""

LINKS = "".join(
    f"GPU {gpu}: NVIDIA H100 80GB HBM3 (UUID: GPU-{gpu})\n"
    + "".join(f"\t Link {link}: 26.562 GB/s\n" for link in range(3))
    + "\t Link 3: <inactive>\n"
    for gpu in range(2)
)

TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m\nGPU0\t X \tNV18\tPIX\t0-27\nGPU1\tNV18\t X \tSYS\t0-27\n"
)


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Put an nvidia-smi that says this, and a dmesg, in front of all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def script(name, *cases, status=0):
        body = "".join(f"'{words}') cat <<'END'\n{text}\nEND\n;;\n" for words, text in cases)
        (folder / name).write_text(f'#!/bin/sh\ncase "$*" in\n{body}esac\nexit {status}\n')
        (folder / name).chmod(0o755)

    def says(log=LOG, links=LINKS, topology=TOPOLOGY, kernel="", status=0):
        script("nvidia-smi", ("-q -x", log), ("nvlink --status", links), ("topo -m", topology), status=status)
        script("dmesg", ("", kernel))

    says()
    return says


def test_healthy(doctor, smi, tmp_path, data):
    code, rows, lines = doctor("--save", tmp_path / "save", "--data-path", data)
    assert (code, lines) == (0, [])
    assert rows["GPU count"] == [("ok", "2 x NVIDIA H100 80GB HBM3, driver 580.105.08")]
    assert rows["GPU health"] == [("ok", "no memory errors, no throttling")]
    assert rows["NVLink"] == [("ok", "3 links of 26.562 GB/s on each GPU")]
    assert rows["topology"] == [("ok", "NV18 between GPUs")]
    assert rows["Xid errors"] == [("ok", "none of the hardware since the node was started")]


FAULTS = [
    (
        "dram_uncorrectable>0",
        "dram_uncorrectable>7",
        "error",
        "uncorrectable ECC errors: dram_uncorrectable 7",
    ),
    ("parity>0", "parity>1", "error", "uncorrectable ECC errors: sram_uncorrectable_parity 1"),
    ("sram_threshold_exceeded>No", "sram_threshold_exceeded>Yes", "error", "too many SRAM errors"),
    ("row_pending>No", "row_pending>Yes", "error", "a memory row waits to be remapped"),
    ("row_failure>No", "row_failure>Yes", "error", "a memory row could not be remapped"),
    ("pending_retirement>N/A", "pending_retirement>Yes", "error", "a memory page waits to be retired"),
    (
        "action>None",
        "action>Drain and Reset",
        "error",
        "asks for recovery: gpu_recovery_action Drain and Reset",
    ),
    ("slowdown>Not Active", "slowdown>Active", "warning", "is throttled"),
]


@pytest.mark.parametrize("healthy, faulty, kind, cause", FAULTS, ids=[fault[3] for fault in FAULTS])
def test_faults_of_the_second_gpu(fails, smi, healthy, faulty, kind, cause):
    first, second = LOG.rsplit("<gpu ", 1)
    assert healthy in second
    smi(f"{first}<gpu {second.replace(healthy, faulty, 1)}")
    told = fails("GPU health", device="cuda", kind=kind)
    assert told.startswith(f"GPU 1 (00000000:2A:00.0) {cause}") and "; " in told


def test_older_driver(fails, smi):
    """It says throttle for event."""
    older = re.sub(r"clocks_event(_reason\w+)", r"clocks_throttle\1", LOG)
    smi(older.replace("slowdown>Not Active", "slowdown>Active", 1))
    assert "GPU 0 (00000000:18:00.0) is throttled" in fails("GPU health", device="cuda", kind="warning")


def test_memory_that_others_hold(fails, smi):
    smi(LOG.replace("4 MiB", "70000 MiB", 1))
    assert "70000 MiB in use by others" in fails("GPU memory", device="cuda", kind="warning")


def test_a_gpu_is_lost(fails, smi):
    smi("Unable to determine the device handle for GPU0000:18:00.0: GPU is lost.", status=15)
    assert "nvidia-smi: Unable to determine" in fails("GPU health", device="cuda")


def test_fewer_than_promised(fails, smi, found, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    found["CUDA"]["gpus"] = 1
    assert "torch sees 1, but SLURM_GPUS_ON_NODE says 2" in fails("GPU count", device="cuda")


def test_a_link_is_down(fails, smi):
    smi(links=LINKS.replace("26.562 GB/s", "<inactive>", 1))
    assert fails("NVLink", device="cuda").startswith("links up on each GPU: 2, 3; ")


def test_mixed_topology(fails, smi):
    smi(topology=TOPOLOGY.replace("NV18", "SYS", 1))
    assert "NV18, SYS between GPUs; " in fails("topology", device="cuda", kind="warning")


def test_xid(fails, smi):
    smi(
        kernel="[1.0] NVRM: Xid (PCI:0000:18:00): 79, pid='<unknown>', GPU has fallen off the bus.\n"
        "[2.0] NVRM: Xid (PCI:0000:18:00): 31, pid=7, name=python, MMU Fault"  # a program's fault
    )
    assert fails("Xid errors", device="cuda", kind="warning").startswith("79 (1 times); ")


def test_no_nvidia_smi(doctor, monkeypatch, found):
    monkeypatch.setenv("PATH", "/nowhere")
    assert doctor()[1]["GPU health"] == [("warning", "nvidia-smi is not there")]
    found["CUDA"] = {"error": "RuntimeError: Found no NVIDIA driver", "missing": False}
    code, rows, _ = doctor()
    assert code == 1
    assert rows["GPU health"] == [("failed", "nvidia-smi is not there")]
    assert rows["CUDA"] == [("failed", "RuntimeError: Found no NVIDIA driver")]
    assert "GPU health" not in doctor("--device", "cpu")[1]
