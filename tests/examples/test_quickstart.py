"""The quickstart's flags train, and its tour understands what the training tells."""

import importlib.util
import math
import shutil
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
    tour["jobs"].train(*([run] for run in runs))
    shown = capsys.readouterr().out.splitlines()
    lines = [line.split()[0] for line in shown if line.endswith("s left") or "]" in line]
    assert sorted(lines) == ["peri", "pre"]  # of four each
    assert [one.progress.validation for one in runs] == [1, 2]
    assert sorted(line.split()[0] for line in shown if "done: validation loss" in line) == ["peri", "pre"]


def test_a_run_goes_on_beside_the_others(tour, tmp_path, capsys):
    """The one that goes on lets the other end; either alone would wait forever."""
    wait = "import os, time\nwhile not os.path.exists('{}'): time.sleep(0.01)\n"
    here, there = (tmp_path / name for name in "ab")
    first = job(tour, "peri", tmp_path, ITERATION.format(3, 3))
    second = job(tour, "peri", tmp_path, f"open('{here}', 'w').close()\n{ITERATION.format(2, 2)}")
    other = job(tour, "pre", tmp_path, wait.format(here) + f"open('{there}', 'w').close()")
    tour["jobs"].train([other], [first, second])
    shown = capsys.readouterr().out
    assert there.exists() and second.log.read_text().count("iteration 1/ 4") == 2
    assert (
        "peri    stopped; resumes from its checkpoint" in shown
        and "peri    done: validation loss 2.000" in shown
    )


def test_a_run_that_fails_does_not_go_on(tour, tmp_path):
    broken = job(tour, "peri", tmp_path, "print('broken'); raise SystemExit(2)")
    second = job(tour, "peri", tmp_path, f"open('{tmp_path / 'second'}', 'w')")
    with pytest.raises(SystemExit, match="broken"):
        tour["jobs"].train([broken, second])
    assert not (tmp_path / "second").exists()


def test_a_run_that_fails_ends_the_others(tour, tmp_path):
    endless = "import time\nwhile True: print('.'); time.sleep(0.05)"
    runs = [
        job(tour, "pre", tmp_path, endless),
        job(tour, "peri", tmp_path, "print('broken'); raise SystemExit(2)"),
    ]
    with pytest.raises(SystemExit, match="broken"):
        tour["jobs"].train(*([run] for run in runs))


def test_every_layer_is_recorded(trained):
    run = read_run(trained[1])
    assert run.layers.iteration.tolist() == [1, 2]
    assert run.layers.layers.tolist() == list(range(run.header["num_layers"] + 2))


def test_the_summary_has_a_row_for_each_run(tour, trained):
    lines = tour["quickstart"].summary({trained[1].parent: 3.25}, 4.5).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:2] == ["peri", "3.250"]


def test_what_the_summary_says_is_counted(tour, trained, tmp_path):
    """Tokens are those of the record; the lowest validation loss is told beside the tokens' entropy."""
    other = tmp_path / "pre"
    shutil.copytree(trained[1].parent, other)
    tokens = 2 * 8 * 128 / 1e6
    for runs, best in (
        ({trained[1].parent: 3.25, other: 3.5}, "peri"),
        ({trained[1].parent: 4, other: 3.25}, "pre"),
        ({trained[1].parent: float("nan"), other: 3.25}, "pre"),
    ):
        *_, said = tour["quickstart"].summary(runs, 4.5).splitlines()
        assert said.split()[0] == best
        assert f"after {tokens:.2f} million tokens" in said
        assert "is 1.25 below 4.50" in said


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
