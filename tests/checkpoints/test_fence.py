"""One restart attempt writes to a folder, however many processes want to at once."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from megatron_periln.checkpoints.fence import Fence, SupersededError
from megatron_periln.checkpoints.restart_attempt import RestartAttempt
from megatron_periln.errors import UsageError


def start(job="", restart=0):
    environment = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)} if job else {}
    return RestartAttempt.from_environment(environment)


def elsewhere(attempt):
    return RestartAttempt.from_json({**attempt.to_json(), "host": "node7"})


def test_the_environment_names_the_restart_attempt():
    assert start("17").name == "job 17, restart 0"
    assert start("17", 2).name == "job 17, restart 2"
    own = {"MEGATRON_PERILN_INCARNATION": "morning", "SLURM_JOB_ID": "17"}
    assert RestartAttempt.from_environment(own).name == "morning"
    assert start().name != start().name


def test_a_requeued_job_takes_over_and_the_old_ranks_are_fenced(tmp_path):
    old = Fence.take(tmp_path, start("17"))
    old.check()
    new = Fence.take(tmp_path, start("17", 1))
    new.check()
    assert new.token > old.token
    with pytest.raises(SupersededError, match=r"newer run: job 17, restart 1 .*this one, job 17, restart 0"):
        old.check()


def test_another_job_takes_over(tmp_path):
    old = Fence.take(tmp_path, start("17", 3))
    new = Fence.take(tmp_path, start("9"))
    new.check()
    with pytest.raises(SupersededError, match="newer run: job 9, restart 0"):
        old.check()


def test_the_superseded_never_come_back(tmp_path):
    """As when torchrun restarts the ranks of an allocation that SLURM gave up."""
    for job in ("17", "18", "19"):
        Fence.take(tmp_path, start(job))
    for job in ("17", "18"):
        with pytest.raises(SupersededError, match="newer run: job 19"):
            Fence.take(tmp_path, start(job))
    Fence.take(tmp_path, start("19")).check()


def test_two_jobs_that_are_requeued_do_not_take_it_from_each_other_in_turn(tmp_path):
    Fence.take(tmp_path, start("17", 1))
    held = Fence.take(tmp_path, start("18"))
    for restart in (0, 1, 2, 7):
        with pytest.raises(
            SupersededError, match=f"newer run: job 18, .*this one, job 17, restart {restart}"
        ):
            Fence.take(tmp_path, start("17", restart))
    held.check()
    again = Fence.take(tmp_path, start("18", 1))
    again.check()
    with pytest.raises(SupersededError):
        Fence.take(tmp_path, start("17", 8))
    Fence.take(tmp_path, start("20")).check()
    with pytest.raises(SupersededError, match="newer run: job 20"):
        Fence.take(tmp_path, start("18", 2))


def test_a_folder_of_an_earlier_version_is_taken(tmp_path):
    Fence.take(tmp_path, start("17"))
    (ticket,) = tmp_path.iterdir()
    entries = json.loads(ticket.read_text())
    del entries["superseded_jobs"]
    ticket.write_text(json.dumps(entries))
    Fence.take(tmp_path, start("18")).check()


def test_a_look_takes_nothing(tmp_path):
    held = Fence.take(tmp_path, start("17"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    Fence.check_free(tmp_path, start("18"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    held.check()
    Fence.take(tmp_path, start("18"))
    with pytest.raises(SupersededError, match="newer run: job 18"):
        Fence.check_free(tmp_path, start("17", 1))


def test_an_old_start_that_comes_late_is_refused(tmp_path):
    Fence.take(tmp_path, start("17", 1))
    with pytest.raises(SupersededError, match="newer run: job 17, restart 1"):
        Fence.take(tmp_path, start("17", 0))


def test_torchrun_may_restart_the_ranks_of_a_job(tmp_path):
    first = Fence.take(tmp_path, start("17"))
    second = Fence.take(tmp_path, start("17"))
    second.check()
    with pytest.raises(SupersededError):
        first.check()


def test_without_a_scheduler_a_live_run_keeps_its_folder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", TAKE, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout.readline() == "taken\n"
        with pytest.raises(UsageError, match=rf"process {run.pid}, since .* writes there; stop it, "):
            Fence.take(tmp_path, start())
        Fence.take(tmp_path, start("17"))  # the scheduler's word counts
        run.kill()


def test_without_a_scheduler_a_dead_run_loses_its_folder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", TAKE, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout.readline() == "taken\n"
        run.kill()
        run.wait()
    Fence.take(tmp_path, start()).check()


def test_without_a_scheduler_a_run_elsewhere_loses_its_folder(tmp_path):
    """Whether it lives can't be told; it stops at its next save."""
    far = Fence.take(tmp_path, elsewhere(start()))
    Fence.take(tmp_path, start()).check()
    with pytest.raises(SupersededError):
        far.check()


TAKE = """
import sys, time
from pathlib import Path
from megatron_periln.checkpoints.fence import Fence
from megatron_periln.checkpoints.restart_attempt import RestartAttempt
Fence.take(Path(sys.argv[1]), RestartAttempt.from_environment({}))
print("taken", flush=True)
time.sleep(60)
"""


def running(folder):
    return subprocess.Popen([sys.executable, "-c", TAKE, str(folder)], stdout=subprocess.PIPE, text=True)


def race(folder, barrier, job, results):
    barrier.wait()
    fences = []
    for restart in range(5):
        try:
            fences.append((Fence.take(folder, start(job, restart)).token, job, restart))
        except SupersededError:  # overtaken at once
            continue
    results.put(fences)


def test_a_race_has_one_winner_and_every_token_one_holder(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    runs = [context.Process(target=race, args=(tmp_path, barrier, str(job), results)) for job in range(8)]
    for run in runs:
        run.start()
    taken = sorted(fence for _ in runs for fence in results.get(timeout=60))
    for run in runs:
        run.join()
    tokens = [token for token, _, _ in taken]
    assert len(set(tokens)) == len(tokens) >= 8
    *others, (token, job, restart) = taken
    Fence(tmp_path, token, start(job, restart)).check()
    for other, job, restart in others:
        with pytest.raises(SupersededError):
            Fence(tmp_path, other, start(job, restart)).check()
    assert [path.name for path in tmp_path.iterdir()] == [f"incarnation-{token:07d}.json"]


def take_slowly(folder, linked, go_on):
    link = os.link

    def late(*args):
        linked.set()
        go_on.wait()
        link(*args)

    os.link = late
    Fence.take(folder, start("1"))


def test_a_ticket_that_comes_so_late_that_its_number_is_free_again_counts_for_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    linked, go_on = context.Event(), context.Event()
    slow = context.Process(target=take_slowly, args=(tmp_path, linked, go_on))
    slow.start()
    linked.wait()
    for job in ("2", "3", "4"):
        Fence.take(tmp_path, start(job))
    go_on.set()
    slow.join()
    assert slow.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["incarnation-0000004.json"]


def test_killed_while_taking(tmp_path):
    """A process killed before its ticket has a name holds nothing."""
    context = multiprocessing.get_context("fork")
    linked, go_on = context.Event(), context.Event()
    victim = context.Process(target=take_slowly, args=(tmp_path, linked, go_on))
    victim.start()
    linked.wait()
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    Fence.take(tmp_path, start("2")).check()


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    old = Fence.take(tmp_path, start("17"))
    Fence.take(tmp_path, start("17", 1)).check()
    with pytest.raises(SupersededError):
        old.check()


def test_a_ticket_cut_off_still_counts(tmp_path):
    old = Fence.take(tmp_path, start("17"))
    (tmp_path / "incarnation-0000002.json").write_text("")
    with pytest.raises(SupersededError, match="newer run: unknown"):
        old.check()
    assert Fence.take(tmp_path, start("17", 1)).token == 3


def test_a_removed_ticket_is_an_error(tmp_path):
    fence = Fence.take(tmp_path, start("17"))
    (tmp_path / "incarnation-0000001.json").unlink()
    with pytest.raises(UsageError, match=r"incarnation-0000001\.json is gone"):
        fence.check()


def test_a_folder_that_is_gone_is_an_error(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    fence = Fence.take(folder, start("17"))
    (folder / "incarnation-0000001.json").unlink()
    folder.rmdir()
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        fence.check()
    with pytest.raises(UsageError, match="cannot be written: No such file"):
        Fence.take(folder, start("18"))


def test_the_ticket_says_who(tmp_path):
    Fence.take(tmp_path, start("17"))
    Fence.take(tmp_path, start("18"))
    ticket = json.loads((tmp_path / "incarnation-0000002.json").read_text())
    assert ticket["holder"]["job"] == "18"
    assert ticket["superseded"] == ["job 17, restart 0"]
