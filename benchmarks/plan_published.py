"""Whether the plan says of published layouts, which were trained, that they fit.

Plans each of benchmarks/published with ``python -m megatron_periln.plan`` in a process of its own, one after
the other, prints a table, and writes JSON. Needs no GPU.

    python benchmarks/plan_published.py --output benchmarks/results/plan_published.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import command, machine

FOLDER = Path(__file__).parent / "published"
GIB = 1 << 30


@dataclass(frozen=True)
class Published:
    """A layout of others; its flag file names the source.

    ``trained`` says whether that has a run's numbers, or is a script alone.
    """

    name: str
    gpu: str
    gpus: int
    trained: bool = True


PUBLISHED = (
    Published("llama3-8b-fp8", "h100-80", 8, trained=False),
    Published("llama3-8b-b200", "b200-180", 8),
    Published("llama3-70b-fp8", "h100-80", 64),
    Published("mixtral-8x22b", "h100-80", 128),
    Published("qwen3-235b", "h100-80", 256),
    Published("llama3.1-405b-fp8", "h100-80", 1024),
    Published("apertus-70b", "gh200-96", 4096),
)


def plan(published: Published) -> dict[str, Any]:
    """Return a layout's plan, or the line in which it ended, and the seconds that it took."""
    flags = [f"@{FOLDER / published.name}.flags", "--world-size", str(published.gpus), "--gpu", published.gpu]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_periln.plan", *flags, "--json", "--no-changes"],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = round(time.perf_counter() - began, 1)
    if not done.stdout.startswith("{"):
        return {**asdict(published), "seconds": seconds, "error": done.stderr.strip().splitlines()[-1]}
    return {**asdict(published), "seconds": seconds, **summary(json.loads(done.stdout))}


def summary(planned: dict[str, Any]) -> dict[str, Any]:
    """Return what the table needs of a plan."""
    fullest = max(planned["ranks"], key=lambda rank: rank["bytes"])
    return {
        "layout": planned["layout"],
        "parameters": planned["checkpoint"]["parameters"],
        "fits": planned["fits"],
        "fullest": fullest["name"],
        "gib": round(fullest["bytes"] / GIB, 1),
        "of_gib": round(planned["gpu"]["memory"] / GIB, 1),
        "memory_gib": {name: round(count / GIB, 2) for name, count in fullest["memory"].items()},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| run | parameters | GPUs | layout | fullest rank | GiB | of | the plan says | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in results:
        gpus = f"{each['gpus']:,} x {each['gpu']}"
        if "error" in each:
            lines.append(f"| {each['name']} | | {gpus} | | | | | {each['error']} | {each['seconds']} |")
            continue
        says = "fits" if each["fits"] else "**does not fit**"
        size = f"{each['parameters'] / 1e9:.1f}B"
        lines.append(
            f"| {each['name']} | {size} | {gpus} | {each['layout']} | {each['fullest']} | {each['gib']} "
            f"| {each['of_gib']} | {says} | {each['seconds']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Plan them all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON with all results")
    parser.add_argument("--only", nargs="+", choices=[each.name for each in PUBLISHED], help="some of them")
    args = parser.parse_args()
    results = [plan(each) for each in PUBLISHED if not args.only or each.name in args.only]
    print(table(results))
    if args.output:
        data = {"machine": machine(), "command": command(), "results": results}
        args.output.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
