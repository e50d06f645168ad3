"""A rank is killed at a random moment, again and again; the run goes on as if nothing had been.

``MEGATRON_PERILN_FAULT_ROUNDS`` and ``MEGATRON_PERILN_FAULT_SEED`` choose how often and when.
"""

import os
import random
import shutil

from megatron_periln.checkpoints.manifest import Manifest
from tests.parallel.test_checkpoints import ASYNC
from tests.training.model import MODEL

ROUNDS = int(os.environ.get("MEGATRON_PERILN_FAULT_ROUNDS", "4"))
SEED = int(os.environ.get("MEGATRON_PERILN_FAULT_SEED", "11"))
LAST, INTERVAL, RANKS = 18, 3, 2
FLAGS = f"{MODEL} --train-iters {LAST} --save-interval {INTERVAL}"
# A save takes about 0.1 s, an asynchronous one as long again beside the training; a step 0.05 s.
LONGEST = {"step": 0.1, "save": 0.4}


def newest(checkpoints):
    """The iteration that the folder's tracker names, which is complete; 0 if there is none."""
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return 0
    folder = checkpoints / f"iter_{int(tracker.read_text()):07d}"
    manifest = Manifest.read(folder)
    assert manifest.has_sums
    manifest.check_sizes(folder)
    manifest.check_sums(folder)
    return int(tracker.read_text())


def test_a_killed_run_goes_on_as_if_nothing_had_been(jobs, capsys):
    dice = random.Random(SEED)
    straight = {point["iteration"]: point for point in jobs.run("undisturbed", FLAGS, RANKS).curve}
    assert list(straight) == list(range(1, LAST + 1))
    checkpoints = jobs.folder / "killed"
    kills = []
    for round in range(ROUNDS + 1):
        start = newest(checkpoints)
        if start >= LAST - INTERVAL:
            shutil.rmtree(checkpoints)
            start = 0
        moment = dice.choice(["step", "save", "save"])
        iteration = start + (INTERVAL * dice.randint(1, 2) if moment == "save" else dice.randint(1, 5))
        kill = f"{dice.randrange(RANKS)} {moment} {iteration} {dice.uniform(0, LONGEST[moment]):.3f}"
        saving = dice.choice(["", ASYNC])
        about = f"seed {SEED}, round {round} from {start}: {kill} {saving}"
        job = jobs.run(
            f"round{round}",
            f"{FLAGS} --save {checkpoints} --load {checkpoints} {saving}",
            RANKS,
            changes=["tests.faults.accidents.killed"] if round < ROUNDS else [],
            environment={"KILL": kill},
            succeeds=round == ROUNDS,
        )
        kills.append(job.exit_codes[int(kill[0])] == -9)
        curve = job.curve if (job.folder / "curve.json").exists() else []
        assert [point["iteration"] for point in curve] == list(range(start + 1, start + 1 + len(curve))), (
            about
        )
        assert all(point == straight[point["iteration"]] for point in curve), about
        if curve:
            assert newest(checkpoints) >= start, about
    with capsys.disabled():
        print(f" seed {SEED}: killed {sum(kills)} times in {ROUNDS} rounds", end="")
    assert sum(kills) > ROUNDS / 2
    assert curve[-1]["iteration"] == LAST
    assert newest(checkpoints) == LAST
