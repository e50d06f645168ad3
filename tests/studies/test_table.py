"""What becomes of a run, and the table over seeds."""

import csv
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_periln.errors import UsageError
from megatron_periln.monitor.reading import read_run
from megatron_periln.studies.measures import MEASURES, measure
from megatron_periln.studies.run_folder import RunFolder
from megatron_periln.studies.study import Study
from megatron_periln.studies.table import collect, markdown, summarize, write_results
from tests.report.synthetic import write_run

GRID = {"norm-placement": {name: ("--norm-placement", name) for name in ("pre", "peri")}}


def study(seeds=(1, 2, 3)):
    return Study(
        name="s", about="?", flags=(), grid=GRID, seeds=seeds, ranks=1, save=False, diverged_above=5.0
    )


def log_of(loss, *, of="on validation set "):
    return f"x\n validation loss at iteration 60 {of}| lm loss value: {loss} | lm loss PPL: 1\nend\n"


def ran(folder, loss, *, exit_code=0, log=None, **run):
    """Put a synthetic run into ``folder``, end it, and return its status."""
    lock = folder.lock()
    assert lock is not None
    folder.begin({"commit": "abc", "versions": {}})
    if run:
        write_run(folder.path, folder.run.choices["norm-placement"], steps=60, num_layers=4, **run)
    (folder.path / "log.txt").write_text(log_of(loss) if log is None else log)
    status = folder.end(exit_code, study().diverged_above)
    os.close(lock)
    return status


def folders(tmp_path, of=None):
    return [RunFolder(tmp_path / run.name, run) for run in (of or study()).runs()]


def measured(folder):
    return measure(folder.read_record(), folder.log)


def test_a_run_finishes_diverges_or_fails(tmp_path):
    first, *_ = folders(tmp_path)
    assert first.read() == {"status": "pending"}
    assert ran(first, "3.25E+00", seed=0) == "finished"
    assert measured(first)["validation_loss"] == 3.25
    for loss, run, reason in (
        ("3.0", {"nan_from": 30}, "loss is nan, iteration 30"),
        ("NAN", {"seed": 0}, "not finite"),
        ("5.01", {"seed": 0}, "5.010, above 5.0"),
    ):
        other = RunFolder(tmp_path / loss, first.run)
        assert ran(other, loss.lower(), **run) == "diverged"
        assert reason in other.read()["reason"]
    early = RunFolder(tmp_path / "early", first.run)
    assert ran(early, "3.0", seed=0, train_iters=61) == "failed"
    assert early.read()["reason"] == "it ended at iteration 60 of 61"
    broken = RunFolder(tmp_path / "broken", first.run)
    assert ran(broken, "3.0", exit_code=1, log="error: no data\nmore\n") == "failed"
    assert broken.read()["reason"] == "no data"
    assert ran(broken, "3.0", exit_code=-9, log="Traceback\nKeyError: 1\n", seed=0) == "failed"
    assert broken.read()["reason"] == "KeyError: 1"
    assert broken.read()["attempts"] == 2


def test_a_run_that_ends_in_nan_diverged_even_when_it_crashed(tmp_path):
    first, *_ = folders(tmp_path)
    assert ran(first, "nan", exit_code=1, nan_from=59) == "diverged"


def test_a_folder_of_other_flags_is_refused(tmp_path):
    first, second, *_ = folders(tmp_path)
    ran(first, "3.0", seed=0)
    with pytest.raises(UsageError, match="other flags than the study has now; give another --output"):
        RunFolder(first.path, second.run).read()


def test_a_folder_belongs_to_one_process(tmp_path):
    first, *_ = folders(tmp_path)
    lock = first.lock()
    assert first.lock() is None
    os.close(lock)
    assert first.lock() is not None


def test_measures_are_those_of_the_record(tmp_path):
    first, *_ = folders(tmp_path)
    ran(first, "3.0", seed=0)
    run, measures = read_run(first.record), measured(first)
    layers = run.layers.values
    assert measures["training_loss"] == pytest.approx(run.steps.loss[-6:].mean(), rel=1e-5)
    assert measures["largest_activation"] == pytest.approx(layers["stream_max_abs"][:, :5].max(), rel=1e-5)
    assert measures["variance_at_start"] == pytest.approx(layers["stream_variance"][0, 4], rel=1e-5)
    assert measures["variance_at_end"] == pytest.approx(layers["stream_variance"][-1, 4], rel=1e-5)
    later = run.steps.grad_norm[15:] / np.median(run.steps.grad_norm[15:])
    assert measures["gradient_peak"] == pytest.approx(later.max(), rel=1e-5)
    assert measures["gradient_outliers"] == sum(later > 5)
    norms = np.hypot(layers["attention_gradient_norm"], layers["mlp_gradient_norm"])[-1, 1:5]
    assert measures["gradient_spread"] == pytest.approx(norms.max() / norms.min(), rel=1e-5)
    assert measures["angular_distance"] == pytest.approx(layers["angular_distance"][-1, 1:5].mean(), rel=1e-5)
    assert 1 < measures["effective_depth"] <= 9  # of 4 layers and the embedding
    assert set(measures) == {"validation_loss", *MEASURES}


def test_the_effective_depth_of_equal_parts_is_their_number():
    """As of scaled-peri: the k-th sublayer adds 1/k of the square of what is there."""
    values = {f"{name}_ratio": [[0, *(1 / (2 * n + i) ** 0.5 for n in range(4)), 0]] for i, name in parts()}
    run = SimpleNamespace(
        header={"num_layers": 4},
        layers=SimpleNamespace(layers=np.arange(6), values={n: np.array(v) for n, v in values.items()}),
    )
    assert MEASURES["effective_depth"].of(run) == pytest.approx(9)


def parts():
    return enumerate(("attention", "mlp"), 1)


def test_a_skipped_step_has_no_gradient_norm_and_leaves_the_others_theirs(tmp_path):
    first, *_ = folders(tmp_path)
    ran(first, "3.0", seed=0)
    lines = first.record.read_text().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if '"kind":"step","iteration":30,' in line)
    lines[number] = json.dumps({**json.loads(lines[number]), "grad_norm": None}) + "\n"
    first.record.write_text("".join(lines))
    norms = read_run(first.record).steps.grad_norm
    assert np.isnan(norms).sum() == 1
    assert measured(first)["gradient_norm"] == pytest.approx(np.nanmedian(norms), rel=1e-5)


def test_statistics_are_those_of_numpy_over_the_seeds_that_finished(tmp_path):
    every = folders(tmp_path)
    losses = {}
    for folder, loss in zip(every, (3.0, 3.5, 3.25, 4.0, 9.0, 3.75), strict=True):
        losses.setdefault(folder.run.choices["norm-placement"], []).append(loss)
        ran(folder, str(loss), seed=folder.run.seed)
    pre, peri = collect(study(), every, "command")["summary"]
    assert (pre["seeds"], pre["finished"], pre["diverged"], pre["missing"]) == (3, 2, 1, 0)
    assert (peri["seeds"], peri["finished"], peri["diverged"], peri["missing"]) == (3, 3, 0, 0)
    kept = [loss for loss in losses["pre"] if loss < 5]
    assert pre["measures"]["validation_loss"] == {
        "n": 2,
        "mean": pytest.approx(np.mean(kept)),
        "std": pytest.approx(np.std(kept, ddof=1)),
    }
    spikes = [measured(f)["gradient_norm"] for f in every if f.run.choices["norm-placement"] == "peri"]
    assert peri["measures"]["gradient_norm"]["std"] == pytest.approx(np.std(spikes, ddof=1))


def test_one_seed_has_no_deviation_and_none_no_mean():
    run = {"choices": {"lr": "1"}, "seed": 1, "status": "finished", "measures": {"validation_loss": 3.0}}
    [row] = summarize([run])
    assert row["measures"]["validation_loss"] == {"n": 1, "mean": 3.0, "std": None}
    assert row["measures"]["seconds"] == {"n": 0, "mean": None, "std": None}
    [row] = summarize([{**run, "status": "failed", "measures": None}, {**run, "status": "diverged"}])
    assert (row["finished"], row["diverged"], row["missing"]) == (0, 1, 1)
    assert row["measures"]["validation_loss"] == {"n": 0, "mean": None, "std": None}


def test_results_say_what_is_missing_and_what_diverged(tmp_path):
    first, second, *others = folders(tmp_path)
    ran(first, "3.0", seed=1)
    ran(second, "7.0", seed=1)
    path = write_results(collect(study(), [first, second, *others], "python -m x"), tmp_path)
    pre, peri = [line for line in path.read_text().splitlines() if line.startswith("| p")]
    assert pre.startswith("| pre | 1 of 3 | 0 | 3.000 |")
    assert peri.startswith("| peri | 1 of 3 | 1 | - |")
    assert "python -m x" in path.read_text()
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["status"] for row in rows] == ["finished", "diverged"] + ["pending"] * 4
    assert (rows[1]["validation_loss"], rows[2]["validation_loss"]) == ("7.0", "")
    results = json.loads((tmp_path / "results.json").read_text())
    profile, _ = results["profiles"]
    run = read_run(first.record)
    assert profile["choices"] == {"norm-placement": "pre"}
    assert profile["variance"][1] == pytest.approx(run.layers.values["stream_variance"][-1, :5], rel=1e-3)
    assert profile["angular_distance"][0][0] is None
    assert results["made"] == [{"commit": "abc", "versions": {}, "machine": None}]
    assert [run.get("made") for run in results["runs"]] == [0, 0] + [None] * 4
    assert results["runs"][0]["flags"] == ["--norm-placement", "pre", "--seed", "1"]


def test_a_run_is_credited_to_all_that_made_it(tmp_path):
    first, second, *_ = folders(tmp_path)
    first.path.mkdir()
    second.path.mkdir()
    for commit in ("abc", "def", "def"):
        first.begin({"commit": commit, "versions": {}})
    second.begin({"commit": "def", "versions": {}})
    results = collect(study(), [first, second], "python -m x")
    assert [made["commit"] for made in results["made"]] == ["def", "abc"]
    assert [(run["made"], run.get("made_before")) for run in results["runs"]] == [(0, [1]), (0, None)]


def test_markdown_rounds_and_shows_the_deviation():
    runs = [
        {"choices": {"a": "x|y"}, "seed": s, "status": "finished", "measures": {"validation_loss": 3 + s / 8}}
        for s in (1, 2)
    ]
    text = markdown({"study": "s", "about": "", "command": "c", "summary": summarize(runs)})
    expected = f"{3 + 3 / 16:.3f} ± {math.sqrt(2) / 16:.3f}"
    assert f"| x\\|y | 2 | 0 | {expected} | - |" in text
