"""Checkpoints of another placement are refused; those of stock Megatron are Pre-LN's."""

import shutil

import pytest

from megatron_periln.norms import PLACEMENTS
from tests.training.model import MODEL

OTHER = {"pre": "peri", "post": "pre", "peri": "output", "output": "post"}


def structure(placement):
    return PLACEMENTS[placement].structure()


def checkpoints(job):
    return job.folder / "checkpoints"


@pytest.fixture(scope="module")
def continued(jobs):
    """Continue from a job's checkpoint for one iteration more."""

    def run(name, job, arguments, **options):
        more = f"--train-iters 7 --override-opt-param-scheduler --load {checkpoints(job)}"
        return jobs.run(f"continued-{name}", f"{MODEL} {more} {arguments}", **options)

    return run


def norms(weights):
    return {name for name in weights if "norm" in name and not name.startswith("optimizer")}


@pytest.mark.parametrize("saved, asked", OTHER.items())
def test_another_placement_is_refused(trained, refused, saved, asked):
    folder = checkpoints(trained(saved))
    error = refused(f"{saved}-as-{asked}", f"--norm-placement {asked} --load {folder}")
    assert str(folder) in error
    assert f"has norm placement {structure(saved)}, and this run asks for {structure(asked)}" in error
    assert f"give --norm-placement {saved}" in error


def test_another_placement_is_refused_at_a_given_iteration(trained, refused, tmp_path):
    shutil.copytree(checkpoints(trained("peri")) / "iter_0000006", tmp_path / "iter_0000006")
    error = refused("given-iteration", f"--norm-placement pre --load {tmp_path} --ckpt-step 6")
    assert f"has norm placement {structure('peri')}" in error


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_another_embedding_norm_is_refused(trained, refused, flag):
    folder = checkpoints(trained("peri"))
    error = refused(f"embedding{flag}", f"--norm-placement peri --no-embedding-norm {flag} {folder}")
    assert "peri (with embedding norm), and this run asks for peri (without embedding norm)" in error
    assert "give --norm-placement peri --embedding-norm to continue it" in error
    assert f"another {flag} " in error


def test_stock_checkpoint_is_refused_by_peri(stock, refused):
    error = refused("stock-as-peri", f"--norm-placement peri --load {checkpoints(stock)}")
    assert f"{checkpoints(stock)}, written by stock Megatron, has norm placement pre" in error


def test_stock_checkpoint_continues_as_pre(stock, trained, continued):
    curve = continued("stock-as-pre", stock, "--norm-placement pre").curve
    assert [point["iteration"] for point in curve] == [7]
    assert curve == continued("pre", trained("pre"), "--norm-placement pre").curve


def test_pre_checkpoint_continues_in_stock_megatron(stock, trained, continued):
    """Megatron's own model and functions load it, strictly, as they load their own."""
    changes = ["tests.training.stock.use_stock_model"]
    ours = continued("pre-in-stock", trained("pre"), "--norm-placement pre", changes=changes)
    theirs = continued("stock-in-stock", stock, "--norm-placement pre", changes=changes)
    assert [point["iteration"] for point in ours.curve] == [7]
    assert ours.curve == theirs.curve


@pytest.mark.parametrize("saved, asked", [("post", "peri"), ("peri", "pre")])
def test_placement_is_adopted_from_the_checkpoint(trained, continued, saved, asked):
    job = continued(
        f"{saved}-adopted-by-{asked}", trained(saved), f"--norm-placement {asked} --use-checkpoint-args"
    )
    assert norms(job.weights(7)) == norms(trained(saved).weights(6))
    assert job.curve == continued(saved, trained(saved), f"--norm-placement {saved}").curve


def test_nothing_to_load_is_nothing_to_refuse(jobs):
    job = jobs.run("load-nothing", f"{MODEL} --exit-interval 1 --load {jobs.folder / 'absent'}")
    assert [point["iteration"] for point in job.curve] == [1]


@pytest.mark.parametrize(
    ("name", "tracker", "arguments", "message"),
    [
        ("garbage-tracker", "abc", "", "names no iteration but 'abc'; write the number of one into it"),
        ("lost-iteration", "9", "", "there is no iter_0000009; mend latest_checkpointed_iteration.txt"),
        ("unknown-step", "6", "--ckpt-step 99", "there is no iter_0000099"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_an_error(refused, tmp_path, name, tracker, arguments, message):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    (tmp_path / "iter_0000006").mkdir()
    assert message in refused(name, f"--load {tmp_path} {arguments}")


def test_the_folder_of_one_checkpoint_is_refused(trained, refused):
    folder = checkpoints(trained("peri")) / "iter_0000006"
    assert f"--load {folder} is one checkpoint; give the folder above it" in refused(
        "one-checkpoint", f"--load {folder}"
    )


def test_another_schedule_is_explained(trained, jobs):
    load = f"--load {checkpoints(trained('peri'))} --train-iters 9"
    job = jobs.run("other-schedule", f"{MODEL} {load}", succeeds=False)
    assert job.exit_codes == [1]
    assert "error: the checkpoint was trained with another schedule" in job.log
    assert "give --override-opt-param-scheduler to follow the flags" in job.log
