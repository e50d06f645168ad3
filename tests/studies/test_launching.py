"""What runs of a study share: the machine's GPUs, and its file system."""

import errno
import fcntl
import os
import time

import pytest
import torch

from megatron_periln.errors import UsageError
from megatron_periln.studies import launching
from megatron_periln.studies.run_folder import RunFolder
from megatron_periln.studies.study import read_study


@pytest.fixture
def study(tmp_path):
    def declare(flags, ranks):
        path = tmp_path / "study.yaml"
        path.write_text(f"flags: {flags}\nseeds: [1, 2, 3, 4]\nranks: {ranks}\n")
        return read_study(path)

    return declare


@pytest.fixture
def gpus(monkeypatch):
    def visible(count, names=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if names is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)

    return visible


def folders(study, path):
    return [RunFolder(path / run.name, run) for run in study.runs()]


def test_every_run_at_a_time_has_its_own_gpus(study, gpus):
    gpus(8)
    assert launching.shares_of_gpus(study("--lr 1", 2), 3) == ["0,1", "2,3", "4,5"]
    gpus(3, "5,GPU-1b,7")
    assert launching.shares_of_gpus(study("--lr 1", 1), 3) == ["5", "GPU-1b", "7"]


def test_more_runs_than_gpus_are_refused(study, gpus):
    gpus(4)
    with pytest.raises(UsageError, match="--jobs 3 with ranks: 2 takes 6 GPUs, and 4 are visible"):
        launching.shares_of_gpus(study("--lr 1", 2), 3)


def test_runs_of_one_process_may_share_gpus(study, gpus):
    gpus(2)
    assert launching.shares_of_gpus(study("--lr 1", 1), 5, shared=True) == ["0", "1", "0", "1", "0"]
    with pytest.raises(UsageError, match="--share-gpus is for runs of one process, and ranks is 2"):
        launching.shares_of_gpus(study("--lr 1", 2), 2, shared=True)
    gpus(0)
    with pytest.raises(UsageError, match="--share-gpus: no GPU is visible"):
        launching.shares_of_gpus(study("--lr 1", 1), 2, shared=True)


def test_the_cpu_is_not_shared_out(study, gpus):
    gpus(0)
    assert launching.shares_of_gpus(study("--device=cpu", 2), 3) == [None] * 3


def test_a_share_goes_from_run_to_run(study, gpus, tmp_path, monkeypatch):
    gpus(4, "4,5,6,7")

    def run(study, folder):
        share = os.environ["CUDA_VISIBLE_DEVICES"]
        try:
            (tmp_path / share).mkdir()  # fails while another run has it
            time.sleep(0.2)
            (tmp_path / share).rmdir()
            (folder.path / "log.txt").write_text(f"ran on {share}")
        finally:
            os._exit(1)

    monkeypatch.setattr(launching, "be_run", run)
    of = study("--lr 1", 2)
    ended = []
    launcher = launching.Launcher(of, launching.shares_of_gpus(of, 2), {})
    launcher.run(folders(of, tmp_path), lambda folder, _: ended.append(folder.read()["reason"]))
    assert sorted(ended) == ["ran on 4,5"] * 2 + ["ran on 6,7"] * 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"


def test_a_folder_is_taken_once_and_always_where_there_are_no_locks(study, tmp_path, monkeypatch):
    first, *_ = folders(study("--lr 1", 1), tmp_path)
    held = first.lock()
    assert held is not None and first.lock() is None

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    other = first.lock()
    assert other is not None
    os.close(other)
    os.close(held)
