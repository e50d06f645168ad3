"""A run is of the data that its files held: what has changed since is not taken for it."""

import os
import struct

import pytest

from megatron_periln.data.indexed.content import content_of
from megatron_periln.errors import UsageError
from megatron_periln.studies import data_files as module
from megatron_periln.studies.__main__ import train
from megatron_periln.studies.data_files import data_files
from megatron_periln.studies.run_folder import RunFolder
from megatron_periln.studies.study import read_study


def write(prefix, tokens):
    """Write a dataset of one document."""
    prefix.with_suffix(".idx").write_bytes(
        struct.pack("<9sQBQQiqqq", b"MMIDIDX", 1, 8, 1, 2, len(tokens), 0, 0, 1)
    )
    prefix.with_suffix(".bin").write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))


@pytest.fixture
def finished(tmp_path):
    """A study and its one run, which has finished: on a blend, with a tokenizer's folder."""
    write(tmp_path / "one", [1, 2, 3])
    write(tmp_path / "two", [4, 5])
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    flags = f"--data-path 0.3 {tmp_path}/one 0.7 {tmp_path}/two --tokenizer-model={tmp_path}/tokenizer"
    (tmp_path / "study.yaml").write_text(f"flags: --device cpu {flags}")
    study = read_study(tmp_path / "study.yaml")
    folder = RunFolder(tmp_path / "run", study.runs()[0])
    os.close(folder.lock())
    folder.begin({"commit": None})
    folder._write({**folder.read(), "status": "finished"})
    return study, folder


def test_what_is_known(finished, tmp_path):
    _, folder = finished
    names = [str(tmp_path / name) for name in ("one", "tokenizer", "two")]
    assert sorted(folder.read()["data"]) == names == sorted(data_files(folder.run.flags))


def test_a_finished_run_is_not_run_again(finished):
    study, folder = finished
    assert train(study, [folder], 1) == []


@pytest.mark.parametrize("name", ["two.bin", "two.idx", "tokenizer/tokenizer.json"])
def test_a_run_of_other_data_is_refused(finished, tmp_path, name):
    """It was taken for a run of what is there now."""
    study, folder = finished
    path = tmp_path / name
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    changed = str(path.with_suffix("")) if path.suffix != ".json" else str(path.parent)
    with pytest.raises(UsageError, match=f"{folder.path}: .* what {changed} held then, and it has changed"):
        train(study, [folder], 1)


def test_data_that_are_elsewhere_are_no_others(finished, tmp_path):
    """As where a study is looked at, and one of before."""
    study, folder = finished
    (tmp_path / "one.bin").unlink()
    assert train(study, [folder], 1) == []
    state = folder.read()
    del state["data"]
    folder._write(state)
    write(tmp_path / "two", [6, 7])
    assert train(study, [folder], 1) == []


def test_data_of_many_runs_are_looked_at_once(finished, tmp_path, monkeypatch):
    study, folder = finished
    asked = []
    monkeypatch.setattr(module, "content_of", lambda prefix: asked.append(prefix) or content_of(prefix))
    assert train(study, [folder] * 5, 1) == []
    assert len(asked) == 2
    write(tmp_path / "two", [4, 5, 6])
    with pytest.raises(UsageError, match=r"and it has changed"):
        train(study, [folder], 1)
