"""Install into an image without touching what is its own; the Dockerfile's steps before and after pip.

``record CONSTRAINTS FOLDER`` notes the image's packages, and writes FOLDER/constraints.txt: the lines of
CONSTRAINTS for packages that neither the image has nor its ``PIP_CONSTRAINT`` names. ``verify FOLDER``
fails if torch, or what was built against it, is another one now. Needs Python alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

__all__ = ["record", "verify"]

_USAGE = "usage: image_packages.py record CONSTRAINTS FOLDER | image_packages.py verify FOLDER"
_KEPT = re.compile(r"torch|pytorch-triton|triton|torchvision|torchao|transformer-engine.*|apex|flash-attn.*")


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _name(requirement: str) -> str:
    """Return the package that a line of a constraints file is about, or an empty string."""
    match = re.match(r"\s*([A-Za-z0-9][\w.-]*)", requirement)
    return _canonical(match[1]) if match else ""


def _installed() -> dict[str, str]:
    return {_canonical(found.metadata["Name"]): found.version for found in distributions()}


def _constrained(files: Iterable[str]) -> set[str]:
    return {_name(line) for file in files for line in Path(file).read_text().splitlines()}


def record(constraints: Path, folder: Path) -> None:
    """Note what is installed, and write the constraints for what is not."""
    installed = _installed()
    if "torch" not in installed:
        sys.exit("error: BASE_IMAGE has no torch; build on NVIDIA's PyTorch image, or another that has it")
    its_own = set(installed) | _constrained(os.environ.get("PIP_CONSTRAINT", "").split())
    lines = [line for line in constraints.read_text().splitlines() if _name(line) not in its_own]
    folder.mkdir()
    (folder / "constraints.txt").write_text("\n".join([*lines, ""]))
    (folder / "installed.json").write_text(json.dumps(installed))


def verify(folder: Path) -> None:
    """Exit with an error if a package that must stay was changed; print the others that were."""
    before, after = json.loads((folder / "installed.json").read_text()), _installed()
    changes = {
        name: f"{name} {before.get(name)} -> {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and (name in before or _KEPT.fullmatch(name))
    }
    lost = [change for name, change in changes.items() if _KEPT.fullmatch(name)]
    if lost:
        sys.exit(
            f"error: installing changed what the image is built around: {', '.join(lost)}; "
            "choose a BASE_IMAGE with a torch that pyproject.toml allows"
        )
    for change in changes.values():
        print(f"changed: {change}")
    print("kept:", ", ".join(f"{name} {after[name]}" for name in sorted(after) if _KEPT.fullmatch(name)))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", constraints, folder]:
            record(Path(constraints), Path(folder))
        case ["verify", folder]:
            verify(Path(folder))
        case ["-h" | "--help"]:
            print(_USAGE, __doc__, sep="\n\n", end="")
        case _:
            sys.exit(_USAGE)
