"""The quickstart's flags train, and its tour understands what the training tells."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

from megatron_periln.doctor import options as doctor_options
from megatron_periln.doctor import probe
from megatron_periln.monitor.reading import read_run
from tests.parallel.conftest import indexed_bytes, jobs  # noqa: F401

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


@pytest.fixture
def tour(monkeypatch):
    """The modules of the quickstart."""
    monkeypatch.syspath_prepend(str(QUICKSTART))
    modules = {}
    for name in ("jobs", "corpus", "quickstart"):
        spec = importlib.util.spec_from_file_location(name, QUICKSTART / f"{name}.py")
        modules[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, modules[name])
        spec.loader.exec_module(modules[name])
    return modules


@pytest.fixture(scope="module")
def trained(jobs):  # noqa: F811
    """Two iterations with the flags of the quickstart."""
    flags = f"@{QUICKSTART / 'model.flags'} --device cpu --norm-placement peri --train-iters 2"
    often = "--lr-warmup-iters 1 --log-interval 1 --eval-interval 1000 --eval-iters 1 --monitor-interval 1"
    tokens = "--tokenizer-type NullTokenizer --vocab-size 300"
    record = jobs.folder / "quickstart" / "peri" / "monitor.jsonl"
    job = jobs.run("quickstart", f"{flags} {often} {tokens} --monitor-file {record}", common="")
    return job, record


def test_progress_is_read_from_the_log_of_megatron(tour, trained):
    seconds = iter([10.0, 13.0])
    progress = tour["jobs"].Progress(clock=lambda: next(seconds))
    shown = [line for line in map(progress.read, trained[0].log.splitlines()) if line]
    assert [line.split("  loss")[0] for line in shown] == [
        f"[{'#' * 15:<30}] 1/2",
        f"[{'#' * 30}] 2/2",
    ]
    assert shown[1].endswith("  0 s left") and "left" not in shown[0]
    assert math.isfinite(progress.validation)


def test_the_time_left_is_that_of_the_iterations_seen(tour):
    seconds = iter([100.0, 104.0])
    progress = tour["jobs"].Progress(clock=lambda: next(seconds))
    line = " iteration {:8d}/      40 | consumed samples: 8 | lm loss: 5.5E+00 |"
    progress.read(line.format(10))
    assert progress.read(line.format(20)).endswith("20/40  loss 5.500  8 s left")


def job(tour, name, tmp_path, program):
    class Job(tour["jobs"].Job):
        command = (sys.executable, "-u", "-c", program)

    return Job(name, [], tmp_path / f"{name}.log")


ITERATION = """print(' iteration 1/ 4 | lm loss: {}E+00 |')
print('validation loss at iteration 1 | lm loss value: {}E+00 |')"""


def test_runs_train_at_the_same_time_each_on_its_line(tour, tmp_path, capsys):
    """Each waits for the other."""
    wait = "import os, time\nopen('{}', 'w').close()\nwhile not os.path.exists('{}'): time.sleep(0.01)\n"
    here, there = (tmp_path / name for name in "ab")
    runs = [
        job(tour, "pre", tmp_path, wait.format(here, there) + "\n".join([ITERATION.format(1, 1)] * 4)),
        job(tour, "peri", tmp_path, wait.format(there, here) + "\n".join([ITERATION.format(2, 2)] * 4)),
    ]
    tour["jobs"].train(*runs)
    shown = capsys.readouterr().out.splitlines()
    lines = [line.split()[0] for line in shown if line.endswith(("loss 1.000", "loss 2.000"))]
    assert sorted(lines) == ["peri", "pre"]  # of four each
    assert [one.progress.validation for one in runs] == [1, 2]


def test_a_run_that_fails_ends_the_others(tour, tmp_path):
    endless = "import time\nwhile True: print('.'); time.sleep(0.05)"
    runs = [
        job(tour, "pre", tmp_path, endless),
        job(tour, "peri", tmp_path, "print('broken'); raise SystemExit(2)"),
    ]
    with pytest.raises(SystemExit, match="broken"):
        tour["jobs"].train(*runs)


def test_every_layer_is_recorded(trained):
    run = read_run(trained[1])
    assert run.layers.iteration.tolist() == [1, 2]
    assert run.layers.layers.tolist() == list(range(run.header["num_layers"] + 2))


def test_the_summary_has_a_row_for_each_run(tour, trained):
    lines = tour["quickstart"].summary({trained[1].parent: 3.25}).splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:2] == ["peri", "3.250"]


def test_the_doctor_knows_how_large_its_checkpoint_is(trained, monkeypatch):
    """Counted by Megatron's formula for weights and Adam, to within its other files and small norms."""
    words = [f"@{QUICKSTART / 'model.flags'}", "--save", "save", "--vocab-size", "300", "--parameters", "5"]
    monkeypatch.setattr(sys, "argv", ["doctor"])
    answer = probe.STEPS["parameters"](doctor_options.parse(words).flags)
    folder = trained[0].folder / "checkpoints" / "iter_0000002"
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert answer["parameters"] * answer["bytes_each"] == pytest.approx(size, rel=0.05)


def test_a_command_that_fails_ends_the_tour_with_its_log(tour, tmp_path, capsys):
    log = tmp_path / "log"
    with pytest.raises(SystemExit) as ended:
        tour["jobs"].run(([sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"], log))
    assert "what went wrong" in str(ended.value) and str(log) in str(ended.value)
