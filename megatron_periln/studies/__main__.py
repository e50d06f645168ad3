"""Run a declared study, or what is left of it, and write its table of results.

Each run has a folder with its flags, versions and commit (cell.json), log and monitor's file. Runs that
finished or diverged are not run again; others start anew, or, with checkpoints, where they were. In a
SLURM array each task takes its share. Flags after -- follow the study's in every run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_periln.command_line import exit_code, parse_flags, prepare_for_megatron, run_command
from megatron_periln.errors import UsageError
from megatron_periln.studies.launching import Launcher, check_run_flags, prepare, shares_of_gpus
from megatron_periln.studies.provenance import provenance
from megatron_periln.studies.run_folder import DONE, RunFolder
from megatron_periln.studies.study import Study, read_study
from megatron_periln.studies.table import collect, write_results

__all__ = ["main", "train"]

PROGRAM = "python -m megatron_periln.studies"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, usage="%(prog)s STUDY.yaml [options]")
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("--output", type=Path, help="folder of the runs; default: runs/studies/NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; default: 1")
    parser.add_argument(
        "--share-gpus", action="store_true", help="several runs of one process on a GPU, if --jobs are more"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--shard", metavar="I/N", help="only every Nth run, from the Ith on, I from 0")
    part.add_argument("--cell", type=int, metavar="K", help="only the Kth run, from 0")
    part.add_argument("--list", action="store_true", help="print the runs and their status, and run nothing")
    part.add_argument("--collect", action="store_true", help="write the table of what is there; run nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 1 after an error or failed runs, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    own, more = given, []
    if "--" in given:
        own, more = given[: given.index("--")], given[given.index("--") + 1 :]
    failed: list[str] = []
    command = shlex.join(word for word in given if word != "--collect")
    code = exit_code(lambda: failed.extend(_run(parse_flags(build_parser(), own), more, command)))
    return code or int(bool(failed))


def _run(args: argparse.Namespace, more_flags: list[str], given: str) -> list[str]:
    """Do what the command line says; return the names of runs that failed."""
    study = read_study(args.study, more_flags)
    output = args.output or Path("runs/studies") / study.name
    folders = [RunFolder(output / run.name, run) for run in study.runs()]
    if args.list:
        for number, folder in enumerate(folders):
            print(f"{number:>4}  {folder.read()['status']:<9} {folder.run.name}")
        return []
    failed = (
        [] if args.collect else train(study, _chosen(args, folders), args.jobs, share_gpus=args.share_gpus)
    )
    print(write_results(collect(study, folders, f"{PROGRAM} {given}"), output))
    return failed


def _chosen(args: argparse.Namespace, folders: list[RunFolder]) -> list[RunFolder]:
    """Return the runs that this process should see to."""
    if args.jobs < 1:
        raise UsageError(f"--jobs is {args.jobs}; at least one run at a time")
    if args.cell is not None:
        if not 0 <= args.cell < len(folders):
            raise UsageError(f"--cell {args.cell}: the study has runs 0 to {len(folders) - 1}")
        return [folders[args.cell]]
    shard = args.shard
    if shard is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        shard = _task_of_array()
    if shard is None:
        return folders
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shard {shard} is not I/N with I from 0 to N - 1, such as 0/8")
    return folders[int(index) :: int(count)]


def _task_of_array() -> str:
    """Return this task's share in a SLURM array; some tasks of one don't know how many the whole has."""
    task, first, last, count = (
        int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT")
    )
    if first != 0 or last != count - 1 or count == 1:
        raise UsageError(
            f"SLURM_ARRAY_TASK_MIN {first}, _MAX {last}, _COUNT {count}: not a whole array, "
            f"which counts from 0; give --shard {task}/N, where N tasks share all runs, or --cell K"
        )
    return f"{task}/{count}"


def train(study: Study, folders: list[RunFolder], jobs: int, *, share_gpus: bool = False) -> list[str]:
    """Run those of ``folders`` that are not done; return the names of those that failed."""
    known: dict[str, dict[str, Any]] = {}
    for folder in folders:
        folder.refuse_other_data(known)
    left = [folder for folder in folders if folder.read()["status"] not in DONE]
    if not left:
        return []
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    prepare_for_megatron()
    prepare(study)
    check_run_flags(study)
    shares = shares_of_gpus(study, jobs, shared=share_gpus)
    failed: list[str] = []
    counts: Counter[str] = Counter()
    tqdm.monitor_interval = 0  # a thread, which a fork would not have
    with tqdm(total=len(folders), initial=len(folders) - len(left), unit="run", disable=None) as bar:

        def on_end(folder: RunFolder, status: str) -> None:
            counts[status] += 1
            if status == "failed":
                failed.append(folder.run.name)
                reason = folder.read()["reason"]
                tqdm.write(f"{folder.run.name} failed: {reason} ({folder.path}/log.txt)", file=sys.stderr)
            bar.update()
            bar.set_postfix(counts)

        bar.set_description(study.name)
        try:
            Launcher(study, shares, provenance()).run(left, on_end)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on") from None
    return failed


if __name__ == "__main__":
    run_command(main)
