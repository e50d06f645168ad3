"""What is read is what was written, also after resumes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_periln.monitor.reading import read_run
from megatron_periln.monitor.record import RunRecord
from megatron_periln.monitor.statistics import STATISTICS
from tests.monitor.records import HEADER, iterations, write


def test_what_is_read_is_what_was_written(path):
    record = RunRecord.open(path, HEADER, 0)
    record.step(1, loss=2.5, grad_norm=math.inf, learning_rate=1e-3, tokens=4096, seconds=0.5)
    record.step(
        2, loss=math.nan, grad_norm=None, learning_rate=np.float32(1e-3), tokens=np.int64(4096), seconds=0.5
    )
    statistics = {name: [None, 0.1, -math.inf, 1e-30] for name in STATISTICS}
    record.layers(2, [0, 1, 2, 3], statistics)
    record.alert(2, "nan", "loss is nan", value=math.nan)
    record.alert(2, "fp16-range", "max |x| ...", layer=1, value=4e4)
    record.close()
    record.close()
    run = read_run(path)
    assert run.header["flags"] == {"lr": 1e-3, "bf16": True} and run.header["schema"] == 1
    assert {key: run.header[key] for key in HEADER} == HEADER
    assert run.steps.iteration.tolist() == [1, 2]
    np.testing.assert_array_equal(run.steps.loss, [2.5, math.nan])
    np.testing.assert_array_equal(run.steps.grad_norm, [math.inf, math.nan])
    assert run.steps.tokens.tolist() == [4096, 4096]
    assert run.layers.layers.tolist() == [0, 1, 2, 3]
    assert run.layers.values.keys() == STATISTICS.keys()
    for values in run.layers.values.values():
        np.testing.assert_array_equal(values, [[math.nan, 0.1, -math.inf, 1e-30]])
    assert [(alert["alert"], alert["layer"], alert["value"]) for alert in run.alerts][1] == (
        "fp16-range",
        1,
        4e4,
    )
    assert math.isnan(run.alerts[0]["value"])


def test_pandas_reads_it(path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    record = RunRecord.open(path, HEADER, 0)
    write(record, 1, 20)
    record.step(21, loss=math.nan, grad_norm=math.inf, learning_rate=0.0, tokens=64, seconds=0.1)
    frame = pandas.read_json(path, lines=True)
    steps = frame[frame.kind == "step"].set_index("iteration")
    loss, grad_norm = steps.loss.astype(float), steps.grad_norm.astype(float)
    assert loss[4] == 0.25 and math.isnan(loss[21]) and grad_norm[21] == math.inf
    layers = frame[frame.kind == "layers"][["iteration", "layers", "stream_variance"]]
    layers = layers.explode(["layers", "stream_variance"])
    assert layers[layers.layers == 0].stream_variance.tolist() == [10.0, 20.0]


@pytest.mark.parametrize("resume_from", [10, 15, 20, 30, 99])
def test_resume_drops_what_comes_again(path, resume_from):
    record = RunRecord.open(path, HEADER, 0)
    write(record, 1, 30)
    record.alert(12, "nan", "early")
    record.alert(28, "nan", "late")
    record = RunRecord.open(path, HEADER | {"flags": {"lr": 2e-3}}, resume_from)
    first = min(resume_from, 30)
    assert iterations(path) == list(range(1, first + 1))
    write(record, resume_from + 1, resume_from + 20)
    assert iterations(path) == [*range(1, first + 1), *range(resume_from + 1, resume_from + 21)]
    for kind in ("step", "layers"):
        assert len(set(iterations(path, kind))) == len(iterations(path, kind))
    assert iterations(path, "alert") == [step for step in (12, 28) if step <= resume_from]
    run = read_run(path)
    assert run.resumed_from == [resume_from] and run.header["flags"] == {"lr": 2e-3}


def test_resumes_from_one_checkpoint_leave_one_line(path):
    write(RunRecord.open(path, HEADER, 0), 1, 20)
    for _ in range(3):
        write(RunRecord.open(path, HEADER, 10), 11, 15)
    assert iterations(path, "run") == [0, 10]
    assert iterations(path) == list(range(1, 16))


def test_resume_without_a_file(path):
    write(RunRecord.open(path, HEADER, 50), 51, 60)
    assert iterations(path) == list(range(51, 61))


def test_a_new_run_keeps_the_earlier_ones(path, caplog):
    for _ in range(3):
        write(RunRecord.open(path, HEADER, 0), 1, 10)
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "monitor.1.jsonl",
        "monitor.2.jsonl",
        "monitor.jsonl",
    ]
    assert iterations(path) == iterations(path.with_name("monitor.1.jsonl")) == list(range(1, 11))
    assert "kept as" in caplog.text
    RunRecord.open(path.with_name("other.jsonl"), HEADER, 0)
    RunRecord.open(path.with_name("other.jsonl"), HEADER, 0)
    assert not path.with_name("other.1.jsonl").exists()  # it held no iteration
