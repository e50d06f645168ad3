"""The doctor in this process, with the packages it found given, and a dataset."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_periln.data.indexed.format import HEADER, MAGIC, VERSION
from megatron_periln.doctor import software, storage
from megatron_periln.doctor.__main__ import main

FOUND = {
    "torch": {"version": "2.15.0"},
    "CUDA": {"version": "13.2", "gpus": 2},
    "NCCL": {"version": "2.30.7"},
    "GPUs": {"version": "2 multiply rightly"},
    "Transformer Engine": {"version": "2.17.1"},
    "cuDNN": {"version": "9.26.0"},
    "attention, norm, linear": {"version": "forward and backward on 2 GPUs, bfloat16"},
    "Apex": {"error": "ModuleNotFoundError: No module named 'apex'", "missing": True},
    "CPU": {"version": "stands in for the GPU: --device cpu"},
    "megatron-core": {"version": "0.19.2"},
    "parameters": {"parameters": 1_000_000, "bytes_each": 14},
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of any job."""
    for name in list(os.environ):
        if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def any_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine's is."""
    monkeypatch.setattr(storage, "TRIED_BYTES", 2 << 20)
    monkeypatch.setattr(storage, "SLOW", 0)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What the doctor finds installed, to change."""
    answers = copy.deepcopy(FOUND)
    monkeypatch.setattr(software, "probe", lambda _: answers)
    return answers


@pytest.fixture
def doctor(found: dict, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict, list[str]]]:
    """Run it; return its exit code, ``{check: [(status, value), ...]}`` and its lines on stderr."""

    def run(*argv: object) -> tuple[int, dict, list[str]]:
        code = main([*map(str, argv), "--json"])
        out, err = capsys.readouterr()
        report = json.loads(out)
        assert report["fit"] == (code == 0)
        rows: dict[str, list[tuple[str, str]]] = {}
        for row in report["rows"]:
            rows.setdefault(row["check"], []).append((row["status"], row["value"]))
        return code, rows, err.splitlines()

    return run


@pytest.fixture
def fails(doctor: Callable, tmp_path: Path, data: Path) -> Callable[..., str]:
    """Run it with one fault; return the one line on stderr, of ``check``."""

    def run(check: str, *argv: object, kind: str = "error", **given: object) -> str:
        flags = {"device": "cpu", "save": tmp_path / "save", "data-path": data, **given}
        code, rows, lines = doctor(*argv, *(word for name in flags for word in (f"--{name}", flags[name])))
        status = {"error": "failed", "warning": "warning"}[kind]
        assert code == (1 if kind == "error" else 0), lines
        assert [name for name in rows if rows[name][0][0] != "ok"] == [check]
        assert rows[check][0][0] == status
        (line,) = lines
        node, named, cause = line.removeprefix(f"{kind}: ").split(": ", 2)
        assert named == check and node == os.uname().nodename
        return cause

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An indexed dataset of two documents, 8 tokens in all."""
    prefix = tmp_path / "corpus"
    tokens = np.arange(8, dtype=np.uint16)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    index = [HEADER.pack(MAGIC, VERSION, 8, 2, 3), np.array([3, 5], np.int32).tobytes()]
    index += [np.array([0, 6], np.int64).tobytes(), np.array([0, 1, 2], np.int64).tobytes()]
    Path(f"{prefix}.idx").write_bytes(b"".join(index))
    return prefix


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system in memory, with options such as ``size=1m``."""
    mounted: list[Path] = []

    def mount_with(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount_with
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)
