"""examples/slurm/preprocess_array.sh, with stand-ins for SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.data.companions import (
    TOOLS,
    build,
    content,
    megatron_merge,
)


def test_slurm_script(tmp_path: Path) -> None:
    """What is submitted, what a task of the array runs, and the merge."""
    script = TOOLS.parent / "examples" / "slurm" / "preprocess_array.sh"
    programs = {
        "sbatch": 'echo "sbatch $*" >&2; echo "77;cluster"',
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "python": 'echo "ran $*"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def bash(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REPO": str(TOOLS.parent)}
        out = {"INPUT": "/c/*.jsonl /d", "OUT": f"{tmp_path}/out", "SHARDS": "3", "CPUS": "2"}
        return subprocess.run(
            ["bash", str(script), *argv],
            env={**paths, **out, "PYTHON": f"{tmp_path}/python", **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    assert "INPUT" in bash(INPUT="").stderr
    assert "SHARDS=x is not a positive number" in bash(SHARDS="x").stderr
    for flag in ("--max-bin-size=1G", "--split-sentences"):
        refused = bash("--append-eod", flag)
        assert refused.returncode == 1
        assert f"{flag}: the merge does not find such datasets" in refused.stderr
        assert "sbatch" not in refused.stderr
    submitted = bash("--append-eod", SITE_FLAGS="--account=a --qos=b")
    assert submitted.returncode == 0, submitted.stderr
    array, merge = submitted.stderr.splitlines()
    assert "--array=0-2%3" in array
    assert array.endswith(f"--account=a --qos=b {script} --append-eod")
    assert "--dependency=afterok:77 " in merge
    assert merge.endswith(f"{script} merge")

    task = bash("--append-eod", SLURM_ARRAY_TASK_ID="2", KEYS="text title").stdout
    part = tmp_path / "out" / "corpus_parts" / "part_00002"
    assert "preprocess_data.py --input /c/*.jsonl /d --json-keys text title " in task
    assert f"--output-prefix {part} --shard 2/3 --workers 2 --resume --append-eod" in task

    expected = tmp_path / "expected"
    for key in ("text", "title"):
        parts = [build(part.with_name(f"part_{n:05}_{key}_document"), [[[n + 1]]]) for n in range(3)]
    megatron_merge(parts, expected, np.uint16)
    last = Path(f"{parts[2]}.idx")
    away = last.rename(tmp_path / "away")
    keys = {"PYTHON": sys.executable, "KEYS": "text title"}
    assert bash("merge", **keys).returncode == 1
    away.rename(last)
    for _ in range(2):  # a merge that was cut off, and one that was done, run again
        again = bash("merge", **keys)
        assert again.returncode == 0, again.stderr
        for key in ("text", "title"):
            assert content(tmp_path / "out" / f"corpus_{key}_document") == content(expected)
        assert [path.name for path in part.parent.iterdir()] == ["merged"]
    assert "corpus_text_document.idx exists: set NAME" in bash().stderr

    assert bash(SLURM_ARRAY_TASK_ID="2").returncode == 0
    assert bash("merge", **keys).returncode == 1, "a shard that ran again is not in the merged dataset"
