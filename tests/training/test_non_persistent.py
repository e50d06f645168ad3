"""A run goes on from its newest checkpoint, persistent or not, and that one is what is looked at."""

import shutil

import pytest

from megatron_periln.checkpoints.intact import choose_intact_checkpoint
from megatron_periln.checkpoints.manifest import MANIFEST
from megatron_periln.checkpoints.reader import Checkpoint
from megatron_periln.checkpoints.saved_arguments import checkpoint_path
from megatron_periln.errors import UsageError
from megatron_periln.megatron_arguments import megatron_arguments
from megatron_periln.norms.arguments import placement_of
from megatron_periln.rules import refuse
from megatron_periln.training.checks import AS_PARSED
from megatron_periln.training.parsing import add_arguments
from megatron_periln.training.placement_checkpoint import refuse_other_placement
from tests.checkpoints.damage import flip_a_bit
from tests.training.model import MODEL

TRACKER = "latest_checkpointed_iteration.txt"
GLOBAL = "--non-persistent-ckpt-type global"
PERI = "--norm-placement peri"
INNER = "non_persistent"


@pytest.fixture(scope="module")
def straight(jobs):
    """Six iterations: a non-persistent checkpoint of 2 and 4, at the end a persistent one of 6."""
    flags = f"{MODEL} {PERI} {GLOBAL} --non-persistent-save-interval 2 --save-interval 1000"
    return jobs.run("non-persistent", f"{flags} --exit-interval 5 --train-iters 6")


@pytest.fixture
def killed(straight, tmp_path):
    """What there is if that run is killed before its first persistent checkpoint."""
    folder = shutil.copytree(straight.folder / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(folder / "iter_0000005")
    (folder / TRACKER).unlink()
    return folder


@pytest.fixture
def both(killed, straight):
    """The non-persistent checkpoints of 2 and 4, and persistent ones of 3 and 1."""
    persistent = straight.folder / "checkpoints" / "iter_0000005"
    for iteration in (1, 3):
        shutil.copytree(persistent, killed / f"iter_000000{iteration}")
    (killed / TRACKER).write_text("3")
    return killed


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Which checkpoint Megatron finds is patched."""
    from megatron.training import checkpointing

    find = checkpointing._get_non_persistent_iteration
    monkeypatch.setattr(checkpointing, "_get_non_persistent_iteration", find)


def chosen(load, flags=GLOBAL):
    """Return the folder of what a Peri-LN run would load, after all checks of checkpoints."""
    words = f"{MODEL} {PERI} --load {load} {flags}".split()
    args = megatron_arguments(words, add_arguments)
    choose_intact_checkpoint(args)
    refuse_other_placement(args, placement_of(args))
    return checkpoint_path(args, "load")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--norm-placement pre", "has norm placement peri .* this run asks for pre"),
        ("--norm-placement output", "has norm placement peri .* this run asks for output"),
        ("--apply-layernorm-1p", "was trained without --apply-layernorm-1p"),
        ("--output-norm-epsilon 0.1", "an output norm epsilon of 1e-05, and this run asks for 0.1"),
    ],
)
def test_another_model_is_refused(killed, flags, message):
    with pytest.raises(UsageError, match=f"the checkpoint in {killed / INNER}.*{message}"):
        chosen(killed, f"{GLOBAL} {flags}")


def test_the_newer_is_loaded(both):
    assert chosen(both) == both / INNER / "iter_0000004"
    (both / TRACKER).write_text("5")
    (both / "iter_0000003").rename(both / "iter_0000005")
    assert chosen(both) == both / "iter_0000005"
    assert chosen(both, "") == both / "iter_0000005"


def test_a_folder_of_its_own_is_looked_at(killed, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (killed / INNER).rename(elsewhere)
    flags = f"{GLOBAL} --non-persistent-global-ckpt-dir {elsewhere}"
    assert chosen(killed, flags) == elsewhere / "iter_0000004"
    with pytest.raises(UsageError, match="has norm placement peri"):
        chosen(killed, f"{flags} --norm-placement pre")


def test_damage_is_found_and_passed_over(both, capsys):
    """For the persistent checkpoint before; and for the non-persistent one that is newer than that."""
    damaged = both / INNER / "iter_0000004"
    flip_a_bit(next(damaged.glob("*.distcp")))
    assert chosen(both) == both / "iter_0000003"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "is broken" in line]
    assert line.startswith(f"--load {both}: {damaged} is broken: __0_")
    assert line.endswith("; using iter_0000003")


def test_an_older_non_persistent_one_stands_in(both, straight):
    from megatron.training import checkpointing

    inner = both / INNER
    shutil.copytree(inner / "iter_0000004", inner / "iter_0000002", dirs_exist_ok=True)
    flip_a_bit(next((inner / "iter_0000004").glob("*.distcp")))
    flip_a_bit(next((both / "iter_0000003").glob("*.distcp")))
    assert chosen(both) == inner / "iter_0000002"
    args = megatron_arguments(GLOBAL.split(), add_arguments)
    assert checkpointing._get_non_persistent_iteration(str(inner), args) == 2
    (inner / TRACKER).write_text("7")  # what the run itself saves after that
    assert checkpointing._get_non_persistent_iteration(str(inner), args) == 7


def test_only_broken_ones_are_an_error(killed):
    shutil.rmtree(killed / INNER / "iter_0000002", ignore_errors=True)
    flip_a_bit(next((killed / INNER / "iter_0000004").glob("*.distcp")))
    with pytest.raises(UsageError, match=r"iter_0000004 is broken: .* has checksum"):
        chosen(killed)


def test_the_step_that_is_asked_for_is_the_one(both):
    """Megatron would load the non-persistent one of iteration 4."""
    assert chosen(both, f"{GLOBAL} --ckpt-step 3") == both / "iter_0000003"


def test_a_step_that_is_not_there_is_an_error(both):
    assert chosen(both, f"{GLOBAL} --ckpt-step 4") == both / INNER / "iter_0000004"
    with pytest.raises(UsageError, match="there is no iter_0000002, but 1, 3; give another --ckpt-step"):
        shutil.rmtree(both / INNER / "iter_0000002", ignore_errors=True)
        chosen(both, f"{GLOBAL} --ckpt-step 2")


@pytest.mark.parametrize("named", ["abc", "release"])
def test_a_tracker_without_an_iteration_is_an_error(killed, named):
    """At which Megatron would end with status 0, or a traceback."""
    (killed / INNER / TRACKER).write_text(named)
    with pytest.raises(UsageError, match=f"non_persistent/{TRACKER} names no iteration but '{named}'"):
        chosen(killed)


def test_a_run_that_has_begun_does_not_start_anew(killed, straight, capsys):
    """Megatron would take the pretrained weights, and forget four iterations."""
    flags = f"{GLOBAL} --pretrained-checkpoint {straight.folder / 'checkpoints'}"
    assert chosen(killed, flags) == killed / INNER / "iter_0000004"
    assert "goes on from" in capsys.readouterr().out
    words = f"{MODEL} {PERI} {flags} --non-persistent-global-ckpt-dir {killed / INNER}".split()
    with pytest.raises(UsageError, match="give --load to go on from it"):
        choose_intact_checkpoint(megatron_arguments(words, add_arguments))


def test_the_folder_of_persistent_ones_is_no_folder_for_others(tmp_path):
    """Megatron deletes there what it finds, but for the newest."""
    for folder in (tmp_path, tmp_path / "run"):
        words = f"--save {tmp_path / 'run'} --save-interval 2 {GLOBAL} --eval-interval 2"
        words += f" --non-persistent-global-ckpt-dir {folder}"
        with pytest.raises(UsageError, match="would delete every checkpoint in it but the newest"):
            refuse(megatron_arguments(f"{MODEL} {PERI} {words}".split(), add_arguments), AS_PARSED)


def test_a_killed_run_goes_on_from_it_to_the_bit(jobs, killed, straight):
    """Saving where it was killed, past a save that did not end, and over a damaged checkpoint."""
    unfinished = killed / INNER / "iter_0000005"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"cut off")
    assert (killed / INNER / "iter_0000004" / MANIFEST).exists()
    more = f"{GLOBAL} --non-persistent-save-interval 3 --exit-interval 5 --load {killed} --save {killed}"
    job = jobs.run("killed-goes-on", f"{MODEL} {PERI} {more}")
    assert job.curve == straight.curve[4:]
    assert "removing iter_0000005, whose saving did not end" in job.log


def test_tools_read_it_where_there_is_no_other(killed, capsys):
    """They said that there was no checkpoint."""
    found = Checkpoint(killed)
    assert found.path == killed / INNER / "iter_0000004"
    assert found.read("decoder.final_layernorm.weight").shape == (64,)
    assert f"--load {killed}: no persistent checkpoint, so that in {INNER} is read" in capsys.readouterr().err
    assert Checkpoint(killed, 4).path == found.path
    with pytest.raises(UsageError, match=f"{INNER}: there is no iter_0000009, but .*another --ckpt-step"):
        Checkpoint(killed, 9)


def test_tools_read_the_persistent_one_where_there_is_one(both, capsys):
    assert Checkpoint(both).path == both / "iter_0000003"
    assert Checkpoint(both, 1).path == both / "iter_0000001"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["0/iter_0000008_0_local.pt", "1/iter_0000008_1_local.pt"],
            "local checkpoints .*iteration 8: ",
        ),
        (["iter_0000008_0_local.pt"], "local checkpoints alone .* and a --save-interval"),
        (["iter_0000002/.metadata", "iter_0000008/.metadata"], "iteration 2, 8; give --ckpt-step 8"),
        (["notes.txt"], "there is no checkpoint; give the folder that --save wrote"),
    ],
)
def test_tools_say_what_there_is_instead(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(UsageError, match=f"--load {tmp_path}: .*{message}"):
        Checkpoint(tmp_path)
