"""The file survives kills, torn lines and full disks; what is none is refused."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from megatron_periln.monitor.lines import RecordError
from megatron_periln.monitor.reading import read_run
from megatron_periln.monitor.record import RunRecord
from tests.monitor.records import HEADER, iterations, write


@pytest.mark.parametrize("cut", [1, 2, 10, 70])
def test_a_torn_last_line_is_repaired(path, cut):
    write(RunRecord.open(path, HEADER, 0), 1, 9)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    whole = 9 if cut == 1 else 8
    assert len(read_run(path).steps.iteration) == whole
    write(RunRecord.open(path, HEADER, 8), 9, 12)
    assert iterations(path) == list(range(1, 13))


@pytest.mark.parametrize("rubbish", [b"\0" * 300, b"{}\n", b'{"kind": "step"', b"\xff\xfe\n"])
def test_rubbish_at_the_end_is_dropped(path, rubbish):
    write(RunRecord.open(path, HEADER, 0), 1, 9)
    with path.open("ab") as file:
        file.write(rubbish)
    write(RunRecord.open(path, HEADER, 9), 10, 12)
    assert iterations(path) == list(range(1, 13))


def test_a_corrupt_line_in_the_middle_is_an_error(path):
    write(RunRecord.open(path, HEADER, 0), 1, 9)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b'{"kind": "step", "iter\n', *lines[5:]]))
    before = path.read_bytes()
    for action in (lambda: RunRecord.open(path, HEADER, 8), lambda: read_run(path)):
        with pytest.raises(RecordError, match=r"monitor\.jsonl, line 5: corrupt"):
            action()
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


RUN_LINE = '{"kind": "run", "iteration": 0, "schema": 1}\n'
LAYERS = '{"kind": "layers", "iteration": 1, '


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no run"),
        ("hello\nworld\n", "not a monitor's file"),
        ('{"a": 1}\n{"a": 2}\n', "not a monitor's file"),
        ('{"kind": "step", "iteration": 1}\n', "not a monitor's file"),
        (RUN_LINE.replace("1}", "99}"), "schema 99, this version reads up to 1: update"),
        (RUN_LINE + '{"kind": "step", "iteration": 1, "loss": "x"}\n', "line 2: not as"),
        (RUN_LINE + LAYERS + '"mlp_ratio": [1]}\n', "line 2: not as"),
        (RUN_LINE + LAYERS + '"layers": [0], "mlp_ratio": [1, 2]}\n', "line 2: not as"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    file = tmp_path / "file"
    file.write_text(content)
    with pytest.raises(RecordError, match=message):
        read_run(file)


def test_missing_file(tmp_path):
    with pytest.raises(RecordError, match="cannot be read: No such file"):
        read_run(tmp_path / "none.jsonl")


def test_another_model_is_refused(path):
    write(RunRecord.open(path, HEADER, 0), 1, 9)
    with pytest.raises(RecordError, match="num_layers 2 where this one has 3"):
        RunRecord.open(path, HEADER | {"num_layers": 3}, 5)


def test_mistakes_of_the_caller(path):
    record = RunRecord.open(path, HEADER, 5)
    with pytest.raises(ValueError, match="unknown statistic"):
        record.layers(10, [0], {"variance": [1.0]})
    with pytest.raises(ValueError, match="1 values for 2 layers"):
        record.layers(10, [0, 1], {"stream_variance": [1.0]})
    with pytest.raises(ValueError, match="step of iteration 5 after that of 5"):
        write(record, 5, 5)
    with pytest.raises(ValueError, match="header lacks placement"):
        RunRecord.open(path, {key: HEADER[key] for key in HEADER if key != "placement"}, 0)


def test_a_former_process_writes_to_no_file_that_is_read(path):
    former = RunRecord.open(path, HEADER, 0)
    write(former, 1, 20)
    record = RunRecord.open(path, HEADER, 10)
    write(former, 21, 30)
    write(record, 11, 15)
    assert iterations(path) == list(range(1, 16))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"monitor\.jsonl: cannot be written"):
        RunRecord.open(tmp_path / "file" / "monitor.jsonl", HEADER, 0)


def test_a_full_disk_costs_lines_and_says_so(path, monkeypatch, caplog):
    record = RunRecord.open(path, HEADER, 0)
    write(record, 1, 3)
    whole = os.write

    def torn(descriptor: int, line: bytes) -> int:
        return whole(descriptor, line[:10])

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "write", torn)
        write(record, 4, 6)
    write(record, 7, 8)
    assert caplog.text.count("training goes on") == 1
    assert iterations(path) == [1, 2, 3, 7, 8]
    (alert,) = read_run(path).alerts
    assert (alert["alert"], alert["iteration"], alert["value"]) == ("record", 7, 3)


def test_a_file_that_went_away_costs_lines_alone(path, monkeypatch, caplog):
    record = RunRecord.open(path, HEADER, 0)

    def stale(descriptor: int) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "fstat", stale)
        write(record, 1, 2)
    write(record, 3, 3)
    assert caplog.text.count("Stale file handle; training goes on") == 1
    assert iterations(path) == [3]


TRAIN = """
    import sys
    from pathlib import Path
    from megatron_periln.monitor.record import RunRecord
    from tests.monitor.records import HEADER

    folder = Path(sys.argv[1])
    checkpoint = folder / "checkpoint"
    start = int(checkpoint.read_text()) if checkpoint.exists() else 0
    record = RunRecord.open(folder / "monitor.jsonl", HEADER, start)
    for step in range(start + 1, 1_000_000):
        record.step(step, loss=1 / step, grad_norm=1.0, learning_rate=1e-3, tokens=64, seconds=0.1)
        if step % 10 == 0:
            record.layers(step, list(range(34)), {"stream_variance": [float(step)] * 34})
        if step % 25 == 0:
            record.sync()
            (folder / "new").write_text(str(step))
            (folder / "new").replace(checkpoint)
"""


def test_kills_lose_and_duplicate_nothing(tmp_path):
    """Killed at ten random moments, once by SIGKILL in the middle of `open` most likely."""
    path, delays = tmp_path / "monitor.jsonl", np.random.default_rng().uniform(0, 0.15, 10)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for delay in delays:
        former = path.stat().st_ino if path.exists() else None
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(TRAIN), tmp_path], env=environment)
        deadline = time.monotonic() + 60
        while not path.exists() or path.stat().st_ino == former:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    checkpoint = int((tmp_path / "checkpoint").read_text())
    run = read_run(path)
    steps, intervals = run.steps.iteration.tolist(), run.layers.iteration.tolist()
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] >= checkpoint > 0
    assert intervals == list(range(10, 10 * len(intervals) + 1, 10)) and intervals[-1] >= checkpoint - 10
    lines = [
        (entry["kind"], entry["iteration"]) for entry in map(json.loads, path.read_text().splitlines()[:-1])
    ]
    assert len(lines) == len(set(lines))
