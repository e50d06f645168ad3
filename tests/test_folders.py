import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.folders import LONGEST

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("plugin", [["-p", "tests.folders"], []])
def test_a_folder_s_tests_run_in_one_process(tmp_path, plugin):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("test_one.py", "test_two.py"):
            (tmp_path / name / file).write_text("".join(f"def test_{n}(): pass\n" for n in range(4)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "-v", "--import-mode", "importlib", *plugin],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    processes = defaultdict(set)
    for process, folder in re.findall(r"^\[(gw\d)\].* PASSED (\w)/", done.stdout, re.MULTILINE):
        processes[folder].add(process)
    assert set(processes) == {"a", "b"}
    assert all(len(those) == 1 for those in processes.values()) == bool(plugin)


def test_the_longest_folders_are_there():
    scopes = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    scopes |= {scope.rpartition("/")[0] for scope in scopes if scope.count("/") > 1}
    assert [scope for scope in LONGEST if scope not in scopes] == []
