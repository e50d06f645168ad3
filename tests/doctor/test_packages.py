"""Packages that are missing or broken, in processes that see only those."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_periln.doctor import software
from megatron_periln.doctor.options import parse
from megatron_periln.package_versions import find_version_mismatch
from tests.doctor.conftest import FOUND

ROOT = Path(__file__).parents[2]
COMMAND = ["-m", "megatron_periln.doctor", "--device", "cpu", "--json"]


def run(*python, path=()):
    done = subprocess.run(
        [*python, *COMMAND],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))},
    )
    assert "Traceback" not in done.stderr
    rows = {row["check"]: (row["status"], row["value"]) for row in json.loads(done.stdout)["rows"]}
    return done.returncode, rows, done.stderr


def test_as_it_is_here():
    code, rows, _ = run(sys.executable)
    assert code == 0
    assert rows["torch"][0] == rows["megatron-core"][0] == rows["requirements"][0] == "ok"


def test_nothing_is_installed():
    """Python alone, without site-packages."""
    code, rows, stderr = run(sys._base_executable, "-S")
    assert code == 1
    assert rows["torch"] == ("failed", "ModuleNotFoundError: No module named 'torch'")
    assert ": torch: ModuleNotFoundError: No module named 'torch'; install torch" in stderr
    assert rows["requirements"][0] == "failed"


BROKEN = {
    "raise OSError('libcublas.so.13: cannot be opened')": "OSError: libcublas.so.13: cannot be opened",
    "import os; os.kill(os.getpid(), 11)": "its import came to SIGSEGV",
    "import os; os.write(2, b'no\\n'); os._exit(3)": "its import came to exit status 3 no",
    "raise SystemExit('not on this machine')": "SystemExit: not on this machine",
    "import time; time.sleep(600)": "its import came to no end in 2 s",
}


@pytest.mark.parametrize("source, cause", BROKEN.items(), ids=BROKEN.values())
def test_broken_torch(tmp_path, monkeypatch, source, cause):
    (tmp_path / "torch.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    options = parse(["--device", "cuda", "--timeout", "2" if "sleep" in source else "100"])
    answers = software.probe(options)
    rows = {row.check: row for row in software.package_rows(options, answers)}
    assert rows["torch"].status == "failed" and rows["torch"].value.startswith(cause)
    assert rows["CUDA"].status == "failed"


def test_an_import_that_cannot_be_killed(tmp_path, monkeypatch):
    """As in a driver that hangs: it is left behind, and its row says what hung."""
    (tmp_path / "torch.py").write_text("import time; time.sleep(20)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    processes = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: processes.append(process))
    began = time.monotonic()
    answers = software.probe(parse(["--timeout", "2"]))
    assert time.monotonic() - began < 10
    assert answers["torch"]["error"] == "its import came to no end in 2 s"
    (left,) = processes
    assert left.poll() is None
    left.send_signal(signal.SIGKILL)
    left.wait()


@pytest.mark.parametrize(
    "name, status",
    [("torch", "failed"), ("Transformer Engine", "warning"), ("Apex", "ok"), ("NCCL", "failed")],
)
def test_a_missing_package(doctor, found, name, status):
    found[name] = {"error": f"ModuleNotFoundError: No module named {name!r}", "missing": True}
    assert doctor()[1][name][0][0] == status
    found[name] = FOUND["torch"]
    assert doctor()[1][name][0][0] == "ok"


def test_a_broken_transformer_engine(doctor, found):
    """Which Megatron would import all the same."""
    found["Transformer Engine"] = {"error": "OSError: undefined symbol: nvte_rmsnorm_fwd", "missing": False}
    assert doctor()[1]["Transformer Engine"] == [("failed", "OSError: undefined symbol: nvte_rmsnorm_fwd")]


def test_a_broken_megatron(tmp_path, monkeypatch):
    """It breaks while the CPU takes the GPU's place, after torch was found."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("raise ImportError('of another torch')")
    code, rows, _ = run(sys.executable, path=[tmp_path])
    assert code == 1
    assert rows["torch"][0] == "ok"
    assert rows["CPU"] == rows["megatron-core"] == ("failed", "ImportError: of another torch")


@pytest.fixture
def old_resiliency(tmp_path):
    """A folder with nvidia-resiliency-ext 0.4.1 as far as megatron-core asks for it, which fails."""
    folder = tmp_path / "site"
    for inner in ("", "checkpointing", "checkpointing/async_ckpt"):
        (folder / "nvidia_resiliency_ext" / inner).mkdir(parents=True)
        (folder / "nvidia_resiliency_ext" / inner / "__init__.py").touch()
    names = ("core", "cached_metadata_filesystem_reader", "filesystem_async", "state_dict_saver")
    files = [f"nvidia_resiliency_ext/checkpointing/async_ckpt/{name}.py" for name in names]
    for file in files:
        (folder / file).touch()
    metadata = folder / "nvidia_resiliency_ext-0.4.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-resiliency-ext\nVersion: 0.4.1\n")
    (metadata / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return folder


MISMATCH = "nvidia-resiliency-ext 0.4.1 does not fit megatron-core 0.19.2"


def test_packages_that_do_not_fit(old_resiliency):
    """The doctor's remedy was to install megatron-core anew."""
    code, rows, stderr = run(sys.executable, path=[old_resiliency])
    assert code == 1
    assert rows["megatron-core"][0] == "failed"
    assert rows["megatron-core"][1].startswith(MISMATCH)
    assert "pip install 'nvidia-resiliency-ext>=0.6'" in stderr


TOKENIZER = "--tokenizer-type NullTokenizer --vocab-size 63"
IMPORT_MEGATRON = {
    "pretrain": ["--device", "cpu"],
    "tools.export_hf": ["--load", "{here}", "--output", "{here}/new"],
    "tools.evaluate": ["--load", "{here}", "--data-path", "{here}/data"],
    "tools.warm_start": [
        "--load",
        "{here}",
        "--output",
        "{here}/new",
        "--insert-output-norms",
        "--data-path",
        "{here}/data",
    ],
    "tools.import_hf": ["--model", "{here}", "--output", "{here}/new"],
    "tools.preprocess_data": f"--input {{here}}/a.jsonl --output-prefix {{here}}/new {TOKENIZER}".split(),
    "studies": ["{here}/study.yaml", "--output", "{here}/runs"],
}
INDEX = struct.pack("<9sQBQQiqqq", b"MMIDIDX", 1, 8, 1, 2, 3, 0, 0, 1)  # of one document of three uint16


@pytest.mark.parametrize("module", IMPORT_MEGATRON)
def test_packages_that_do_not_fit_are_one_line_of_what_imports_megatron(old_resiliency, tmp_path, module):
    """The tools ended in the AttributeError of Megatron's import."""
    flags = [flag.format(here=tmp_path) for flag in IMPORT_MEGATRON[module]]
    (tmp_path / "data.idx").write_bytes(INDEX)
    (tmp_path / "data.bin").write_bytes(bytes(6))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.jsonl").write_text('{"text": "1 2 3"}\n')
    (tmp_path / "study.yaml").write_text("flags: --device cpu")
    done = subprocess.run(
        [sys.executable, "-m", f"megatron_periln.{module}", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{old_resiliency}{os.pathsep}{ROOT}"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {MISMATCH}"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("version", ["0.6.0", "0.10.1"])
def test_packages_that_fit(old_resiliency, monkeypatch, version):
    (metadata,) = old_resiliency.glob("*.dist-info/METADATA")
    metadata.write_text(metadata.read_text().replace("0.4.1", version))
    monkeypatch.syspath_prepend(str(old_resiliency))
    assert find_version_mismatch() is None
    metadata.write_text(metadata.read_text().replace(version, "0.5.2"))
    assert "nvidia-resiliency-ext 0.5.2 does not fit" in find_version_mismatch().what


@pytest.mark.parametrize("name", ["torch", "CPU", "megatron-core"])
def test_what_was_not_answered(doctor, found, name):
    """Nothing is fit for want of an answer."""
    del found[name]
    assert doctor("--device", "cpu")[1][name][0][0] == "failed"


def test_other_versions(doctor, monkeypatch):
    version = software.importlib.metadata.version
    monkeypatch.setattr(
        software.importlib.metadata,
        "version",
        lambda name: "0.18.0" if name == "megatron-core" else version(name),
    )
    ((status, value),) = doctor("--device", "cpu")[1]["requirements"]
    assert status == "failed" and value in ("megatron-core is 0.18.0, not <0.20,>=0.19.2",)


def test_home_that_cannot_be_written(doctor, monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")
    assert doctor("--device", "cpu")[1]["home folder"] == [("warning", "HOME=/nonexistent can't be written")]


def test_flags_that_are_wrong(capsys):
    from megatron_periln.doctor.__main__ import main

    for argv, words in {
        "--device gpu": ["--device", "'gpu'", "--help"],
        "@absent.flags": ["flag file absent.flags", "give @FILE"],
        "--all-reduce": ["SLURM_PROCID, SLURM_NTASKS", "not set", "torchrun"],
    }.items():
        assert main(argv.split()) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert all(word in error for word in words)
