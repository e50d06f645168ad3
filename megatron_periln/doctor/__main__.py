"""``python -m megatron_periln.doctor``: run the checks, print a table, exit 1 if this node is not fit."""

from __future__ import annotations

import os
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_periln.doctor import gpus, indexed_datasets, model_step, options, software, storage
from megatron_periln.doctor.communication import (
    ThisRank,
    check_all_reduce,
    check_clocks,
    connect,
    disconnect,
    find_rank,
    gather,
)
from megatron_periln.doctor.planned_run import check_plan
from megatron_periln.doctor.rows import Row, as_json, as_lines, as_table, fit
from megatron_periln.doctor.timeouts import Check, run_check
from megatron_periln.errors import UsageError

__all__ = ["main"]


def _node_checks(flags: Namespace, answers: software.Answers) -> list[tuple[str, Check]]:
    checks: list[tuple[str, Check]] = [
        ("Python", software.check_python),
        ("requirements", software.check_requirements),
        ("packages", partial(software.package_rows, flags, answers)),
    ]
    if flags.device == "cuda":
        checks.append(("GPU health", partial(gpus.check_gpus, flags, answers)))
        checks.append(("Xid errors", partial(gpus.check_kernel_log, flags)))
    checks.append(("shared memory", storage.check_shared_memory))
    if flags.save is None:
        checks.append(("save folder", lambda: [Row("save folder", "warning", "not checked", "give --save")]))
    else:
        size = software.checkpoint_bytes(flags, answers)
        checks.append(("save folder", partial(storage.try_save_folder, Path(flags.save))))
        without = "" if flags.parameters else answers.get("parameters", {}).get("without", "")
        checks.append(("free disk", partial(storage.check_checkpoint_room, flags, size, without)))
    checks.append(("datasets", partial(indexed_datasets.check_datasets, flags)))
    if model_step.describes_a_model(flags):
        checks.append((model_step.CHECK, partial(model_step.check_model_step, flags, answers)))
    if flags.plan:
        checks.append(("plan", partial(check_plan, flags)))
    return checks


def _check_node(flags: Namespace) -> list[Row]:
    checks = _node_checks(flags, software.probe(flags))
    # The step's own limit, which has its row, comes first.
    longer = {model_step.CHECK: flags.timeout + 10, "plan": flags.timeout + 10}
    return [row for name, check in checks for row in run_check(name, check, longer.get(name, flags.timeout))]


def _check_ranks(flags: Namespace, here: ThisRank, node: str, rows: list[Row]) -> tuple[list[Row], bool]:
    """Return the rows of all ranks and True; or this rank's and False, where the ranks can't meet."""
    # The others may still look at their nodes: there are about five slow checks.
    met = run_check("rendezvous", partial(connect, here, 5 * flags.timeout), 5 * flags.timeout + 5)
    found = met
    if fit(met):
        found = found + run_check("clocks, ranks", partial(check_clocks, here, node), flags.timeout)
        found = found + run_check("all-reduce", partial(check_all_reduce, here, flags), flags.timeout)
    rows = rows + [replace(row, node=node) for row in found]
    if not fit(met):
        return rows, False
    try:
        rows = gather(rows, here)
        disconnect()
    except RuntimeError as error:
        return [*rows, Row("rendezvous", "failed", f"a rank went away: {error}", node=node)], False
    return rows, True


def main(argv: Sequence[str] | None = None) -> int:
    """Check and print; return 0 if nothing failed, 1 otherwise.

    With several ranks all return the same, and rank 0 prints for all.
    """
    try:
        flags = options.parse(sys.argv[1:] if argv is None else argv)
        here = find_rank(flags.all_reduce)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    rows = [replace(row, node=node) for row in _check_node(flags)] if here.local_rank == 0 else []
    together = False
    if here.size > 1:
        rows, together = _check_ranks(flags, here, node, rows)
    if here.rank == 0 or not together:
        print(as_json(rows) if flags.json else as_table(rows), flush=True)
        print(*as_lines(rows), sep="\n", end="\n" if as_lines(rows) else "", file=sys.stderr, flush=True)
    return 0 if fit(rows) else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a check that hangs must not hold up the end
