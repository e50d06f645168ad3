"""``python -m megatron_periln.plan @FLAGS --world-size N``: what a run will take, before it is launched."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_periln import cpu
from megatron_periln.command_line import exit_code, prepare_for_megatron, run_command
from megatron_periln.errors import UsageError
from megatron_periln.plan.machine.gpus import gpu_named
from megatron_periln.plan.options import labelled_layouts, parse

if TYPE_CHECKING:
    from megatron_periln.plan.answer.fit import Remedy
    from megatron_periln.plan.answer.planned import Machine

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan and return the exit code: 0 if the run fits, 1 if not or after an error."""
    return exit_code(lambda: _plan(sys.argv[1:] if argv is None else argv))


def _plan(argv: Sequence[str]) -> None:
    options = parse(argv)
    gpu = gpu_named(options.gpu)
    layouts = labelled_layouts(options)
    prepare_for_megatron()
    cpu.activate(hide_gpu=True)
    # After the line above, which decides what "cuda" is while Megatron is imported.
    from megatron_periln.plan.answer.planned import Machine

    if options.network:
        gpu = gpu.with_network(options.network)
    machine = Machine(gpu, options.nodes_of or gpu.node, options.mfu, options.disk)
    if layouts:
        _compare(options, layouts, machine)
    else:
        _one(options, machine)


def _one(options: Namespace, machine: Machine) -> None:
    # As above.
    from megatron_periln.plan.answer.as_json import as_data
    from megatron_periln.plan.answer.fit import find_remedies
    from megatron_periln.plan.answer.page import write_plan
    from megatron_periln.plan.answer.planned import Planned, plan_layout
    from megatron_periln.plan.answer.screen import refusal, screen, verdict

    def plan(flags: Sequence[str]) -> Planned:
        return plan_layout("the run", flags, options.world_size, machine)

    planned = plan(options.flags)
    remedies: list[Remedy] | None = None
    if not planned.fits and not options.no_changes:
        remedies = find_remedies(options.flags, planned, plan)
    if options.page:
        write_plan([planned], options.page)
    if options.json:
        print(json.dumps(as_data(planned, remedies or ()), indent=2))
    elif not options.brief:
        print(screen(planned, remedies))
    elif planned.fits:
        print(verdict(planned))
    if not planned.fits:
        raise UsageError(refusal(planned, remedies))


def _compare(options: Namespace, layouts: Sequence[tuple[str, list[str], int]], machine: Machine) -> None:
    # As above.
    from megatron_periln.plan.answer.as_json import as_data
    from megatron_periln.plan.answer.page import write_plan
    from megatron_periln.plan.answer.planned import plan_layout
    from megatron_periln.plan.answer.screen import comparison

    planned, refused = [], []
    for label, flags, world_size in layouts:
        try:
            planned.append(plan_layout(label, flags, world_size, machine))
        except UsageError as error:
            refused.append(f"{label}: {error}")
    if not planned:
        raise UsageError(f"none of the runs can be planned: {refused[0]}")
    if options.page:
        write_plan(planned, options.page)
    if options.json:
        print(json.dumps({"plans": [as_data(each) for each in planned], "refused": refused}, indent=2))
    else:
        print(comparison(planned, refused))
    if not any(each.fits for each in planned):
        raise UsageError(f"none of the {len(layouts)} runs fits {machine.gpu.name}")


if __name__ == "__main__":
    run_command(main)
