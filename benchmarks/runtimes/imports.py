"""Folders that other tools made of exports, imported; runs in this project's Python."""

from pathlib import Path

from child import answer

from megatron_periln import cpu

cpu.activate(hide_gpu=True)
from megatron_periln.convert.import_model import ImportOptions, import_model  # noqa: E402


def imported(job):
    """Return the line of the parity check."""
    said = []
    import_model(Path(job["folder"]), Path(job["work"]) / "imported", ImportOptions(), say=said.append)
    return next(line for line in said if line.startswith("Parity check"))


answer((), imported=imported)
