"""The table in docs/architecture.md, which ``python -m tests.patches.architecture_page`` writes anew."""

import importlib
import inspect
import pkgutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
HEADING = "## What is changed in Megatron and torch"
INTRODUCTION = """\
An upgrade of Megatron or torch needs this table alone. Everything that the package changes in them is in
[patches](../megatron_periln/patches), and described there beside the function that changes it; but for what
makes "cuda" mean the CPU, in [cpu](../megatron_periln/cpu). A change can go once the tests in its last column
fail. This section is written by `python -m tests.patches.architecture_page`.
"""


def modules():
    """Return all modules that change something upstream, imported."""
    from megatron_periln import cpu, patches

    return [
        importlib.import_module(module.name)
        for package in (patches, cpu)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]


def all_patches():
    """Return all patches, in the order of their files and lines."""
    from megatron_periln.patches.registry import PATCHES

    modules()
    return sorted(
        PATCHES,
        key=lambda patch: (
            patch.file.startswith("cpu/"),
            patch.file,
            inspect.unwrap(patch.function).__code__.co_firstlineno,
        ),
    )


def section():
    """Return the section of docs/architecture.md about patches."""
    lines = ["| changed | why | by | goes when this fails |", "|---|---|---|---|"]
    for patch in all_patches():
        symbols = "<br>".join(f"`{symbol}`" for symbol in patch.symbols)
        by = f"[{patch.function.__name__}](../megatron_periln/{patch.file})"
        tests = [(test.split("::")[1], test.split("::")[0]) for test in patch.until]
        until = "<br>".join(f"[{name}](../{path})" for name, path in tests) or f"stays: {patch.stays}"
        lines.append(f"| {symbols} | {patch.why} | {by} | {until} |")
    return f"{HEADING}\n\n{INTRODUCTION}\n" + "\n".join(lines) + "\n"


def written():
    """Return that section as it stands in the page, and what is before and after it."""
    text = PAGE.read_text() if PAGE.exists() else "# Architecture\n"
    before, _, rest = text.partition(HEADING)
    here, mark, after = rest.partition("\n## ")
    return (HEADING + here).rstrip() + "\n", before, mark + after


if __name__ == "__main__":
    from megatron_periln import cpu

    cpu.activate(hide_gpu=True)
    _, before, after = written()
    PAGE.write_text(before.rstrip() + "\n\n" + section() + after)
