"""A real study: killed, continued, with a run that diverges and one that fails."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_periln import flag_files
from megatron_periln.monitor.reading import read_run
from megatron_periln.studies.__main__ import main
from tests.parallel.conftest import indexed_bytes, jobs  # noqa: F401
from tests.training.model import MODEL

ROOT = Path(__file__).parents[2]

STUDY = f"""
about: A test.
flags: |
  --device cpu --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2 --seq-length 32
  --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 2 --lr 1e-3
  --attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 256
  --split 90,10,0 --log-interval 1 --eval-iters 1 --eval-interval 1000 --num-workers 0 {MODEL}
  --save-interval 3
grid:
  variant:
    peri: --norm-placement peri
    hot: --norm-placement pre --lr 1e30
    impossible: --norm-placement peri --hidden-size 33
seeds: [1, 2]
save: true
"""


def run_study(arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_periln.studies", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory, indexed_bytes, jobs):  # noqa: F811
    """Run a study that is killed, and run it again: how both end, states between and after."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.yaml").write_text(STUDY)
    command = [str(folder / "study.yaml"), "--output", str(folder / "runs")]
    data = ["--", "--data-path", str(indexed_bytes), "--data-cache-path", str(folder / "cache")]
    job = {"folder": str(folder), "ranks": 1, "arguments": [*command, *data], "timeout": 120}
    killed = jobs.submit(job | {"changes": ["tests.studies.killed.run"]})
    between = states(folder / "runs")
    again = run_study([*command, "--jobs", "2", *data])
    return killed, between, again, states(folder / "runs"), folder


def states(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/cell.json")}


def statuses(states):
    return {name: state["status"] for name, state in states.items()}


def test_the_killed_study_keeps_what_was_done(study):
    killed, between, *_ = study
    assert killed.exit_codes == [-signal.SIGKILL], killed.log
    assert between["peri,seed=1"]["status"] == "finished"
    assert between["peri,seed=2"]["status"] == "running"


def test_the_same_command_goes_on(study):
    _, between, again, after, _ = study
    assert again.returncode == 1  # for the run that failed
    assert statuses(after) == {
        f"{variant},seed={seed}": status
        for variant, status in (("peri", "finished"), ("hot", "diverged"), ("impossible", "failed"))
        for seed in (1, 2)
    }
    assert after["peri,seed=1"] == between["peri,seed=1"]
    assert after["peri,seed=2"]["attempts"] == 2
    assert after["impossible,seed=1"]["attempts"] == 2
    assert after["hot,seed=1"] == between["hot,seed=1"]


def test_a_run_that_failed_is_told_and_the_bar_of_a_terminal_is_not(study):
    _, _, again, after, _ = study
    lines = again.stderr.splitlines()
    assert len(lines) == 2
    assert all("impossible" in line and "divisible" in line and "log.txt" in line for line in lines)
    assert "divisible" in after["impossible,seed=1"]["reason"]


def test_every_run_keeps_what_it_was_made_of(study):
    *_, after, folder = study
    for name, state in after.items():
        assert state["versions"]["megatron-core"].startswith("0.19")
        assert state["flags"][-2:] == ["--seed", name[-1]]
        assert "commit" in state
        assert (folder / "runs" / name / "log.txt").exists()
        assert (
            flag_files.expand([f"@{folder / 'runs' / name / 'run.flags'}"])[: len(state["flags"])]
            == (state["flags"])
        )


def test_the_run_that_was_cut_off_resumes_from_its_checkpoint(study):
    *_, folder = study
    run = read_run(folder / "runs" / "peri,seed=2" / "monitor.jsonl")
    assert run.resumed_from == [3]
    assert run.steps.iteration.tolist() == list(range(1, 7))


def test_a_run_that_diverges_ends_there(study):
    *_, after, folder = study
    steps = read_run(folder / "runs" / "hot,seed=1" / "monitor.jsonl").steps
    finite = np.isfinite(steps.loss) & np.isfinite(steps.grad_norm)
    assert finite[:-1].all()
    assert not finite[-1]
    assert len(finite) < 6
    assert f"is nan, iteration {len(finite)}" in after["hot,seed=1"]["reason"]


def test_the_table_has_both_seeds_and_hides_nothing(study):
    *_, folder = study
    results = json.loads((folder / "runs" / "results.json").read_text())
    rows = {row["choices"]["variant"]: row for row in results["summary"]}
    runs = [run for run in results["runs"] if run["choices"]["variant"] == "peri"]
    losses = [run["measures"]["validation_loss"] for run in runs]
    assert losses[0] != losses[1]
    assert all(5 < loss < 7 for loss in losses)
    assert rows["peri"]["measures"]["validation_loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert [rows[name][what] for name, what in (("hot", "diverged"), ("impossible", "missing"))] == [2, 2]


def test_a_flag_that_megatron_lacks_is_one_error_before_anything_runs(tmp_path, indexed_bytes, capfd):  # noqa: F811
    (tmp_path / "study.yaml").write_text(STUDY.replace("--hidden-size 33", "--hiden-size 33"))
    arguments = [tmp_path / "study.yaml", "--output", tmp_path / "runs", "--", "--data-path", indexed_bytes]
    assert main(list(map(str, arguments))) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: study, run impossible,seed=1: ")
    assert "--hiden-size" in line
    assert not (tmp_path / "runs").exists()
