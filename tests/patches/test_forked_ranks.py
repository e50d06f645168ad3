"""Ranks that are forked from their launcher are what torchrun would have started."""

import json
import os
import subprocess
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

ROOT = Path(__file__).parents[2]

RANK = """
import json, os, sys
leads = os.getsid(0) == os.getpid()
print(json.dumps([sys.argv[1:], os.environ["LOCAL_RANK"], __name__, leads, os.getppid()]))
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
sys.exit(int(sys.argv[1]))
"""

LAUNCHER = """
import json, os, sys
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from megatron_periln.patches.starting import forked_ranks
ranks = forked_ranks.fork_ranks(3, "rank")
forked_ranks.start_as_ranks(ranks, "rank")
unused = ranks[2].pid
def start(number, word):
    command = (sys.executable, "-u", "-m", "rank", word)
    environment = {**os.environ, "LOCAL_RANK": str(number)}
    with open(f"{number}.log", "w") as log:
        return subprocess_handler.Popen(args=command, env=environment, stdout=log, stderr=None)
jobs = [start(0, "3"), start(1, "killed")]
ranks.clear()
jobs.append(start(2, "0"))
statuses = [job.wait(timeout=60) for job in jobs]
os.waitpid(unused, 0)
print(json.dumps([os.getpid(), statuses, [type(job).__name__ for job in jobs]]))
"""


def test_upstream_still_starts_ranks_by_the_name_of_popen():
    assert subprocess_handler.Popen is subprocess.Popen
    assert "Popen" in subprocess_handler.SubprocessHandler._popen.__code__.co_names


def test_ranks_are_forked_told_what_they_are_and_waited_for(tmp_path):
    """The one that is not used ends, and one that is started when none waits is a process of its own."""
    (tmp_path / "rank.py").write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    launcher, statuses, kinds = json.loads(done.stdout)
    assert statuses == [3, -9, 0]
    assert kinds == ["Rank", "Rank", "Popen"]
    for number, word in enumerate(["3", "killed", "0"]):
        arguments, local_rank, name, leads, parent = json.loads((tmp_path / f"{number}.log").read_text())
        assert (arguments, local_rank, name, parent) == ([word], str(number), "__main__", launcher)
        assert leads == (number < 2)  # the last one's session is Popen's to choose
