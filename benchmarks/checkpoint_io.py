"""What manifests and checksums cost a checkpoint: saving and loading side by side in one run.

The same tensors go through plain torch.save and torch.load, Megatron's distributed checkpoint, ours
with sizes and with checksums, and Megatron's --verify-integrity. All bring what they save to the
disk; before each load the page cache forgets the files. The best of the rounds counts: what else the
machine does only adds. Prints a table and writes JSON.

    python benchmarks/checkpoint_io.py --device cpu --megabytes 1024
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import command, machine
from one_process import start_megatron

from megatron_periln.files import sync

SIDE = 2048  # a tensor has 16 MiB


def tensors(megabytes: int) -> dict[str, torch.Tensor]:
    """Return random fp32 tensors on the CPU."""
    generator = torch.Generator().manual_seed(1234)
    count = max(1, (megabytes << 20) // (4 * SIDE * SIDE))
    return {f"layer{i}.weight": torch.randn(SIDE, SIDE, generator=generator) for i in range(count)}


class Plain:
    """One file of torch.save."""

    def __init__(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        self.state, self.folder = state, folder

    def save(self) -> None:
        """Save to an empty folder."""
        torch.save(self.state, self.folder / "state.pt")
        sync(self.folder / "state.pt")

    def load(self) -> dict[str, torch.Tensor]:
        """Load what was saved."""
        return torch.load(self.folder / "state.pt", weights_only=True)


class Distributed(Plain):
    """Megatron's distributed checkpoint; with its own checksums, or with our manifest."""

    def __init__(
        self, state: dict[str, torch.Tensor], folder: Path, *, theirs: bool = False, ours: str = "off"
    ) -> None:
        super().__init__(state, folder)
        self.theirs, self.ours = theirs, ours

    def save(self) -> None:
        """Save to an empty folder."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        from megatron_periln.checkpoints import sums
        from megatron_periln.checkpoints.manifest import Manifest
        from megatron_periln.patches import checkpoint_writer

        writer = filesystem_async.FileSystemWriterAsync
        original = writer.get_save_function_and_args
        vars(filesystem_async).pop("open", None)
        if self.ours == "full":
            checkpoint_writer.open_with(sums.open_summed)
        try:
            dist_checkpointing.save(
                self.sharded(self.state),
                str(self.folder),
                async_strategy="mcore",
                verify_integrity=self.theirs,
            )
        finally:
            writer.get_save_function_and_args = original
        if self.ours != "off":
            Manifest.of(self.folder, sums=self.ours == "full").write(self.folder)

    def load(self) -> dict[str, torch.Tensor]:
        """Check and load what was saved."""
        from megatron.core import dist_checkpointing

        from megatron_periln.checkpoints.manifest import Manifest

        if self.ours != "off":
            manifest = Manifest.read(self.folder)
            assert manifest is not None
            manifest.check_sizes(self.folder)
            manifest.check_sums(self.folder)
        empty = {name: torch.empty_like(tensor) for name, tensor in self.state.items()}
        return dist_checkpointing.load(self.sharded(empty), str(self.folder), verify_integrity=self.theirs)

    @staticmethod
    def sharded(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the tensors as Megatron shards them in a world of one process."""
        from megatron.core.dist_checkpointing import ShardedTensor

        return {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in state.items()}


def forget(folder: Path) -> None:
    """Let the page cache forget the files in ``folder``, which are on the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(call: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Return how long a call takes on the wall and in user CPU time, and its result."""
    start, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    result = call()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - cpu
    return (time.perf_counter() - start, used), result


def rounds(
    contestants: dict[str, Plain], count: int
) -> Iterator[tuple[str, tuple[float, float], tuple[float, float]]]:
    """Yield each contestant's wall and CPU seconds to save and to load; they take turns."""
    for turn in range(count + 1):
        for name, contestant in contestants.items():
            contestant.folder.mkdir()
            saved, _ = seconds(contestant.save)
            forget(contestant.folder)
            loaded, state = seconds(contestant.load)
            for key, tensor in contestant.state.items():
                assert torch.equal(state[key], tensor), f"{name} loads another {key}"
            del state
            shutil.rmtree(contestant.folder)
            if turn:  # the first warms up
                yield name, saved, loaded


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to measure; default: temporary"
    )
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args()
    about = machine()
    logging.disable(logging.WARNING)
    start_megatron(options.device, 1)
    state = tensors(options.megabytes)
    size = sum(tensor.nbytes for tensor in state.values())
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "checkpoint"
        contestants = {
            "torch.save, torch.load": Plain(state, folder),
            "Megatron": Distributed(state, folder),
            "ours, --checkpoint-verify size": Distributed(state, folder, ours="size"),
            "ours, --checkpoint-verify full": Distributed(state, folder, ours="full"),
            "Megatron, --verify-integrity": Distributed(state, folder, theirs=True),
        }
        kinds = ("save", "save user", "load", "load user")
        samples: dict[str, dict[str, list[float]]] = {
            name: {kind: [] for kind in kinds} for name in contestants
        }
        for name, saved, loaded in rounds(contestants, options.rounds):
            for kind, taken in zip(kinds, (*saved, *loaded), strict=True):
                samples[name][kind].append(taken)
    results = []
    print(f"{'':<32}" + "".join(f"{f'{kind} s/GB':>15}{'over Megatron':>15}" for kind in kinds))
    for name, seconds_taken in samples.items():
        row: dict[str, Any] = {"name": name, "seconds": seconds_taken}
        line = f"{name:<32}"
        for kind in kinds:
            per_gb = min(seconds_taken[kind]) / (size / 1e9)
            over = min(seconds_taken[kind]) / min(samples["Megatron"][kind])
            row[kind] = {"seconds_per_gb": per_gb, "over_megatron": over}
            line += f"{per_gb:>15.2f}{over:>15.2f}"
        results.append(row)
        print(line)
    if options.output:
        report = {"device": about, "command": command(), "bytes": size, "results": results}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
