"""Input that no report can be made of: one error each, and nothing written."""

from __future__ import annotations

import pytest

from tests.report.synthetic import write_run


@pytest.fixture
def refused(tool, capsys, tmp_path):
    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert tool.main([str(argument) for argument in arguments]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


def test_wrong_flag(refused, tmp_path):
    assert "unknown flag --outptu (did you mean --output?); --help" in refused(tmp_path, "--outptu", "r")


def test_missing(refused, tmp_path):
    assert "none: no such file or folder" in refused(tmp_path / "none", "--output", tmp_path / "r.html")


def test_folder_without(refused, tmp_path):
    write_run(tmp_path / "runs" / "peri", steps=3)
    told = refused(tmp_path / "runs", "--output", tmp_path / "r.html")
    assert "a folder without a monitor.jsonl; did you mean" in told and "runs/peri?" in told


def test_folder_of_no_monitored_run(refused, tmp_path):
    told = refused(tmp_path, "--output", tmp_path / "r.html")
    assert told.endswith("a folder without a monitor.jsonl; train with --monitor-layers all\n")


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\x00\n" * 9, b"{}\n[]\n", b"<html>\n</html>\n"])
def test_no_monitors_file(refused, tmp_path, content):
    (tmp_path / "file.jsonl").write_bytes(content)
    assert "file.jsonl: " in refused(tmp_path / "file.jsonl", "--output", tmp_path / "r.html")


def test_corrupt_line(refused, tmp_path):
    path = write_run(tmp_path / "run", steps=9)
    path.write_text(path.read_text().replace('"iteration":5,"loss"', '"iteration":5,,"loss"'))
    assert "corrupt" in refused(path, "--output", tmp_path / "r.html")


def test_no_iteration(refused, tmp_path):
    path = write_run(tmp_path / "run", steps=0)
    assert "holds no iteration yet" in refused(path, "--output", tmp_path / "r.html")


def test_header_without_placement(refused, tmp_path):
    path = write_run(tmp_path / "run", steps=3)
    path.write_text(path.read_text().replace('"placement"', '"place"', 1))
    assert "lacks placement" in refused(path, "--output", tmp_path / "r.html")


def test_twice(refused, tmp_path):
    path = write_run(tmp_path / "run", steps=3)
    assert "given more than once" in refused(path, path.parent, "--output", tmp_path / "r.html")


def test_output(refused, tmp_path):
    path = write_run(tmp_path / "run", steps=3)
    assert "is a folder" in refused(path, "--output", tmp_path)
    assert "is one of the runs" in refused(path, "--output", path)
    assert "cannot be written: " in refused(path, "--output", path / "r.html")


def test_a_failed_write_leaves_the_former_report(refused, tmp_path, monkeypatch):
    path, output = write_run(tmp_path / "run", steps=3), tmp_path / "r.html"
    output.write_text("former")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    assert "No space left" in refused(path, "--output", output)
    assert output.read_text() == "former"
