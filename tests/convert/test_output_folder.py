"""The exported folder appears whole, or not at all."""

import importlib
import os

import pytest

from megatron_periln import files
from megatron_periln.convert import export as exporting
from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.errors import UsageError

FILES = {"config.json", "generation_config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def tool():
    return importlib.import_module("megatron_periln.tools.export_hf")


def quietly(_):
    pass


def test_files(exported):
    assert {path.name for path in exported("peri")[0].iterdir()} == FILES


@pytest.mark.parametrize("shard_bytes", [1 << 30, 1 << 16], ids=["one file", "several"])
def test_the_umask_says_who_may_read(saved, tmp_path, shard_bytes):
    umask = os.umask(0o027)
    try:
        options = ExportOptions(verify=False, shard_bytes=shard_bytes)
        export(saved("peri").folder, tmp_path / "model", options, say=quietly)
    finally:
        os.umask(umask)
    files = list((tmp_path / "model").iterdir())
    assert any(file.suffix == ".safetensors" for file in files)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_an_error_while_writing_leaves_nothing(saved, tmp_path, monkeypatch):
    stream = exporting.exported_tensors

    def full(*args):
        for n, item in enumerate(stream(*args)):
            if n == 9:
                raise OSError(28, "No space left on device")
            yield item

    monkeypatch.setattr(exporting, "exported_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        export(saved("peri").folder, tmp_path / "model", ExportOptions(shard_bytes=1), say=quietly)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_while_writing_leaves_nothing(saved, tmp_path, monkeypatch, end):
    stream = exporting.exported_tensors

    def interrupted(*args):
        for n, item in enumerate(stream(*args)):
            if n == 9:
                raise end
            yield item

    monkeypatch.setattr(exporting, "exported_tensors", interrupted)
    with pytest.raises(end):
        export(saved("peri").folder, tmp_path / "model", ExportOptions(shard_bytes=1), say=quietly)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_any_time_leaves_no_model(saved, tmp_path, monkeypatch):
    """The final name is there only when every file is, on the disk, and the parity check has passed."""
    output, synced, stream = tmp_path / "model", set(), exporting.exported_tensors

    def watched(*args):
        for item in stream(*args):
            assert not output.exists()
            yield item

    def say(line):
        assert output.exists() is line.startswith("Wrote")

    def sync(path):
        assert not output.exists() or path == tmp_path
        synced.add(path.name)

    monkeypatch.setattr(exporting, "exported_tensors", watched)
    monkeypatch.setattr(files, "sync", sync)
    export(saved("peri").folder, output, ExportOptions(), say=say)
    assert {*FILES, tmp_path.name} < synced


def test_an_existing_folder_is_not_touched(saved, tmp_path):
    output = tmp_path / "model"
    output.mkdir()
    export(saved("peri").folder, output, ExportOptions(verify=False), say=quietly)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    with pytest.raises(UsageError, match="exists; choose another, or remove it"):
        export(saved("peri").folder, output, ExportOptions(verify=False), say=quietly)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_tool_says_what_it_did(saved, tool, tmp_path, capsys):
    output = tmp_path / "model"
    code = tool.main(["--load", str(saved("pre").folder), "--output", str(output), "--target", "llama"])
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "Target llama (LlamaForCausalLM): asked for; runs in transformers, vLLM, SGLang and llama.cpp"
    )
    assert any(line.startswith("Parity check: largest difference of the logits in fp32: ") for line in lines)
    assert lines[-1] == f"Wrote {output}"


def test_tool_names_the_target_and_why(saved, tool, tmp_path, capsys):
    tool.main(["--load", str(saved("peri").folder), "--output", str(tmp_path / "model"), "--no-verify"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "Target glm4 (Glm4ForCausalLM): it computes peri, and runs in transformers, vLLM, SGLang and "
        "llama.cpp; others that do: hyperclovax"
    )
    assert "The logits were not compared (--no-verify)" in lines


@pytest.mark.parametrize(
    "load, arguments, message",
    [
        ("absent", [], "there is no checkpoint; give the folder that --save wrote"),
        ("", ["--ckpt-step", "99"], "there is no iter_0000099"),
        ("iter_0000007", [], "is one checkpoint; give the folder above it"),
        ("", ["--tokenizer", "absent"], "--tokenizer absent: no such folder, nor a file; give a tokenizer's"),
    ],
)
def test_bad_input_is_one_clear_error(saved, tool, tmp_path, capsys, load, arguments, message):
    folder = saved("peri").folder / load
    code = tool.main(["--load", str(folder), "--output", str(tmp_path / "model"), *arguments])
    error = capsys.readouterr().err
    assert code == 1
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []
