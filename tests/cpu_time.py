"""CPU seconds of each test: a pytest plugin, for a machine that others use too, where wall time says nothing.

    CPU_TIME=times.jsonl python -m pytest -p tests.cpu_time -p no:xdist tests/norms
    python -m tests.cpu_time times.jsonl

Counts this process, the children that it has waited for, and all of their descendants that still run.
"""

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

TICKS = os.sysconf("SC_CLK_TCK")


def spent():
    """Return the CPU seconds that this process has spent, and those of what it has started."""
    seconds, children = {}, defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        process = int(path.parent.name)
        seconds[process] = sum(map(int, fields[11:15])) / TICKS
        children[int(fields[1])].append(process)
    living, todo = 0.0, list(children[os.getpid()])
    while todo:
        living += seconds[process := todo.pop()]
        todo += children[process]
    waited_for = os.times()
    return time.process_time(), waited_for.children_user + waited_for.children_system + living


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    before = spent()
    ended = yield
    own, started = (after - earlier for after, earlier in zip(spent(), before, strict=True))
    with Path(os.environ["CPU_TIME"]).open("a") as stream:
        stream.write(json.dumps({"test": item.nodeid, "own": own, "started": started}) + "\n")
    return ended


def main():
    folders, files = defaultdict(float), defaultdict(float)
    for line in Path(sys.argv[1]).read_text().splitlines():
        test = json.loads(line)
        path = test["test"].partition("::")[0]
        files[path] += test["own"] + test["started"]
        folders["/".join(path.split("/")[:2])] += test["own"] + test["started"]
    for sums in (folders, files):
        for name, seconds in sorted(sums.items(), key=lambda pair: -pair[1]):
            print(f"{seconds:8.1f} {name}")


if __name__ == "__main__":
    main()
