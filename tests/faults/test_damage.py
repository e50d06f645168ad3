"""Checkpoints that were damaged on the disk, and saves that it has no room for."""

import os
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_periln.checkpoints.fence import Fence
from megatron_periln.checkpoints.guard import SaveGuard, put_back, tidy
from megatron_periln.checkpoints.intact import choose_intact_checkpoint
from megatron_periln.checkpoints.manifest import MANIFEST
from megatron_periln.checkpoints.restart_attempt import RestartAttempt
from megatron_periln.errors import UsageError
from tests.checkpoints.damage import flip_a_bit
from tests.faults.test_fencing import ONE_BY_ONE
from tests.parallel.test_checkpoints import ASYNC
from tests.training.model import MODEL

FLAGS = f"{MODEL} --save-interval 2"
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def straight(jobs):
    """Six iterations on two ranks, with checkpoints of 2, 4 and 6."""
    return jobs.run("straight", FLAGS, 2)


@pytest.fixture
def checkpoints(straight, tmp_path):
    return shutil.copytree(straight.folder / "checkpoints", tmp_path / "checkpoints")


def choose(folder, verify="full", step=None, **others):
    args = Namespace(load=str(folder), ckpt_step=step, checkpoint_verify=verify, enable_msc=False)
    vars(args).update({"rank": 0, "world_size": 1, "pretrained_checkpoint": None, **others})
    choose_intact_checkpoint(args)
    return args.ckpt_step


DAMAGE = {
    "flip": (
        lambda folder: flip_a_bit(folder / "__1_0.distcp"),
        r"__1_0.distcp has checksum \w+ instead of \w+",
    ),
    "truncate": (
        lambda folder: os.truncate(folder / "__0_0.distcp", 1000),
        r"__0_0.distcp has 1,000 bytes instead of [\d,]+",
    ),
    "lose": (lambda folder: (folder / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "metadata": (lambda folder: flip_a_bit(folder / ".metadata"), r"\.metadata has checksum"),
    "manifest": (lambda folder: os.truncate(folder / MANIFEST, 50), "manifest.json can't be read"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "its saving did not end"),
    "gone": (shutil.rmtree, "the folder is missing"),
}


def test_an_intact_checkpoint_is_verified(checkpoints, capsys):
    assert choose(checkpoints) is None
    assert "iter_0000006: sizes and checksums of 4 files as saved" in capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(checkpoints, damage, capsys):
    spoil, message = DAMAGE[damage]
    spoil(checkpoints / "iter_0000006")
    assert choose(checkpoints) == 4
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--load")]
    assert line.startswith(f"--load {checkpoints}: iter_0000006 is broken: ")
    assert line.endswith("; using iter_0000004")
    assert re.search(message, line), line


def test_sizes_alone_miss_a_flipped_bit(checkpoints, capsys):
    flip_a_bit(checkpoints / "iter_0000006" / "__0_0.distcp")
    assert choose(checkpoints, "size") is None
    assert "sizes of 4 files" in capsys.readouterr().out
    os.truncate(checkpoints / "iter_0000006" / "__0_0.distcp", 9)
    assert choose(checkpoints, "size") == 4
    assert choose(checkpoints, "off") is None


def test_the_one_that_is_asked_for_has_no_substitute(checkpoints):
    flip_a_bit(checkpoints / "iter_0000004" / "__0_0.distcp")
    assert choose(checkpoints) is None
    with pytest.raises(UsageError, match=r"iter_0000004 is broken: __0_0.distcp has checksum .*; restore"):
        choose(checkpoints, step=4)
    with pytest.raises(UsageError, match=r"^--pretrained-checkpoint .*iter_0000004 is broken"):
        (checkpoints / TRACKER).write_text("4")
        choose(None, load=None, pretrained_checkpoint=str(checkpoints))


def test_only_broken_ones_are_an_error(checkpoints):
    for iteration in (2, 4, 6):
        flip_a_bit(checkpoints / f"iter_000000{iteration}" / "__0_0.distcp")
    with pytest.raises(UsageError, match=r"iter_0000006 is broken.*4 is broken.*2 is broken"):
        choose(checkpoints)


def test_without_a_manifest_it_is_unverified(checkpoints, capsys):
    (checkpoints / "iter_0000006" / MANIFEST).unlink()
    assert choose(checkpoints) is None
    assert "iter_0000006: unverified, for it has no manifest.json" in capsys.readouterr().out


def test_stock_megatron_takes_no_notice_of_what_is_beside(checkpoints, tmp_path):
    from megatron.training import checkpointing

    bare = shutil.copytree(checkpoints, tmp_path / "bare")
    for path in (*bare.glob("incarnation-*.json"), *bare.glob(f"iter_*/{MANIFEST}")):
        path.unlink()
    found = []
    for folder in (checkpoints, bare):
        iteration = checkpointing.read_metadata(checkpointing.get_checkpoint_tracker_filename(folder))
        name = checkpointing.find_checkpoint_rank_0(folder, *iteration)
        args = vars(checkpointing.dist_checkpointing.load_common_state_dict(name)["args"])
        kind = checkpointing._get_checkpoint_format(name, Namespace())
        found.append((iteration, Path(name).name, args, kind))
    assert found[0] == found[1]
    assert (found[0][0], found[0][3]) == ((6, False), "torch_dist")


def test_without_a_checkpoint_there_is_nothing_to_choose(tmp_path):
    assert choose(tmp_path) is None
    assert choose(tmp_path / "missing") is None


def test_all_ranks_go_on_from_the_one_before(jobs, straight, checkpoints):
    """One rank's share of the reading holds the flipped bit."""
    flip_a_bit(checkpoints / "iter_0000006" / "__1_0.distcp")
    flip_a_bit(checkpoints / "iter_0000004" / "__0_0.distcp")
    job = jobs.run("flipped", f"{FLAGS} --load {checkpoints} --save {checkpoints}", 2)
    assert job.curve == straight.curve[2:]
    assert job.log.count("iter_0000004 is broken: __0_0.distcp has checksum") == 1
    assert job.log.count("; using iter_0000002") == 1
    assert choose(checkpoints) is None, "those that were broken have been saved anew"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "incarnation-0000002.json",
        *(f"iter_000000{iteration}" for iteration in (2, 4, 6)),
        TRACKER,
    ]


def test_what_a_cut_off_save_left_is_removed(checkpoints, capsys):
    (checkpoints / TRACKER).write_text("4")
    unfinished = checkpoints / "iter_0000006"
    for name in (MANIFEST, "metadata.json", ".metadata"):
        (unfinished / name).unlink()
    stock = checkpoints / "iter_0000002"
    (stock / MANIFEST).unlink()
    other_format = shutil.copytree(stock, checkpoints / "iter_0000001")  # as --ckpt-format fsdp_dtensor
    (other_format / "metadata.json").unlink()
    (checkpoints / "iter_0000003").mkdir()
    (checkpoints / "replaced-iter_0000003").symlink_to(stock)
    tidy(checkpoints)
    assert not unfinished.exists()
    assert stock.exists()
    assert other_format.exists()
    assert "removing iter_0000006, whose saving did not end" in capsys.readouterr().out
    assert choose(checkpoints) is None


@pytest.mark.parametrize("finalized", [False, True])
def test_a_checkpoint_that_was_being_replaced_is_put_back(checkpoints, finalized):
    """Killed while iteration 6 was saved anew, before or after its manifest was there."""
    old, new = checkpoints / "replaced-iter_0000006", checkpoints / "iter_0000006"
    new.rename(old)
    shutil.copytree(old, new)
    (new / "is-new").touch()
    if not finalized:
        (new / MANIFEST).unlink()
    tidy(checkpoints)
    assert not old.exists()
    assert (new / "is-new").exists() == finalized
    assert choose(checkpoints) is None


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_goes_on_from_what_was_being_replaced(checkpoints, tmp_path, elsewhere):
    """Unless it saves elsewhere: then the folder is another run's."""
    new = checkpoints / "iter_0000006"
    new.rename(checkpoints / "replaced-iter_0000006")
    new.mkdir()
    (new / "__0_0.distcp").touch()
    save = tmp_path / "elsewhere" if elsewhere else checkpoints
    args = Namespace(save=str(save), load=str(checkpoints), enable_msc=False, rank=0, world_size=1)
    put_back(args)
    assert choose(checkpoints) == (4 if elsewhere else None)


def test_all_ranks_go_on_from_what_was_being_replaced(jobs, checkpoints):
    shutil.copytree(checkpoints / "iter_0000006", checkpoints / "replaced-iter_0000006")
    for name in (".metadata", "metadata.json", MANIFEST):
        (checkpoints / "iter_0000006" / name).unlink()
    more = "--train-iters 7 --override-opt-param-scheduler"
    job = jobs.run("replaced", f"{FLAGS} {more} --load {checkpoints} --save {checkpoints}", 2)
    assert [point["iteration"] for point in job.curve] == [7]
    assert not list(checkpoints.glob("*-iter_*"))


def test_killed_while_what_was_replaced_is_deleted(checkpoints, monkeypatch):
    """Without manifests, a checkpoint that is half deleted is not taken for the good one."""
    guard = SaveGuard(lambda: Fence.take(checkpoints, RestartAttempt.from_environment()), "off", 10)
    new = checkpoints / "iter_0000006"
    good = {path.name: path.read_bytes() for path in new.iterdir() if path.name != MANIFEST}
    guard.before_save(new)
    for name, content in good.items():
        (new / name).write_bytes(content)

    def killed(folder, **_):
        (Path(folder) / "__0_0.distcp").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", killed)
        guard.finalize(checkpoints / TRACKER, "6")
    tidy(checkpoints)
    assert {path.name: path.read_bytes() for path in new.iterdir()} == good
    assert [path.name for path in checkpoints.iterdir() if "iter_0000006" in path.name] == [new.name]


def test_a_fallback_leaves_the_pretrained_checkpoint_alone(checkpoints, tmp_path):
    """Megatron reads it only where --load has none."""
    (checkpoints / "iter_0000006" / "__1_0.distcp").unlink()
    assert choose(checkpoints, pretrained_checkpoint=str(tmp_path / "absent")) == 4


@pytest.mark.parametrize("saving", ["", ASYNC], ids=["", "async"])
def test_a_full_disk_leaves_the_checkpoint_before(jobs, saving):
    name = f"full{'-async' if saving else ''}"
    job = jobs.run(
        name, f"{FLAGS} {saving}", 1, changes=[ONE_BY_ONE, "tests.faults.accidents.disk_full"], succeeds=False
    )
    checkpoints = job.folder / "checkpoints"
    assert job.exit_codes == [1], job.log
    (error,) = [line for line in job.log.splitlines() if line.startswith("error:")]
    assert "a checkpoint could not be saved" in error
    assert (checkpoints / TRACKER).read_text() == "2"
    assert choose(checkpoints) is None
    resumed = jobs.run(f"{name}-resumed", f"{FLAGS} --load {checkpoints} --save {checkpoints}")
    assert "removing iter_0000004, whose saving did not end" in resumed.log
    assert [point["iteration"] for point in resumed.curve] == [3, 4, 5, 6]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("megatron_periln.checkpoints.fence.sync", read_only)
    with pytest.raises(UsageError, match=r"^--save .*: cannot be written: Read-only file system; give"):
        Fence.take(tmp_path, RestartAttempt.from_environment())
    assert not list(tmp_path.iterdir())
