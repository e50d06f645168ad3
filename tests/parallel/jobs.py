"""Training jobs for tests: what to run, and what came of it."""

import functools
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import checkpoint

from tests.parallel.connecting import connect

COMMON = """
    --device cpu --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --min-lr 1e-4
    --lr-decay-style cosine --lr-decay-iters 40 --lr-warmup-iters 2 --weight-decay 0.1 --clip-grad 1.0
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02 --seed 1234 --train-iters 10
    --tokenizer-type NullTokenizer --vocab-size 256 --make-vocab-size-divisible-by 128 --split 90,5,5
    --log-interval 1 --eval-iters 1 --eval-interval 1000 --num-workers 0 --no-save-rng
"""


@dataclass(frozen=True)
class Finished:
    """A job that has ended."""

    folder: Path
    exit_codes: list[int]
    orphans: list[int]  # how those processes of ranks have ended whose parents had ended before
    left: list[str]  # processes that were still there

    @property
    def log(self):
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("rank*.log")))

    @property
    def curve(self):
        """One dict an iteration: iteration, grad norm, lm loss."""
        return json.loads((self.folder / "curve.json").read_text())

    @property
    def gradients(self):
        """Those of the first step, each at its full shape."""
        return join_parts(self.folder / "gradients")

    def weights(self, iteration):
        return load_tensors(self.folder / "checkpoints" / f"iter_{iteration:07d}")


@functools.lru_cache(8)  # one process's are compared with those of several layouts
def load_tensors(folder):
    """Return every tensor of a distributed checkpoint at its full shape."""
    reader = checkpoint.FileSystemReader(folder)
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "size")
    }
    checkpoint.load(state, storage_reader=reader, no_dist=True)
    return state


@functools.lru_cache(8)
def join_parts(folder):
    """Return the tensors whose parts ranks have saved, as `tests.parallel.probe` does."""
    whole, there = {}, {}
    for path in folder.iterdir():
        for name, shape, offset, part in torch.load(path):
            if name not in whole:
                whole[name], there[name] = torch.empty(shape, dtype=part.dtype), torch.zeros(shape).bool()
            place = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
            assert not there[name][place].any(), f"{name}: two ranks have saved {place}"
            whole[name][place], there[name][place] = part, True
    for name, known in there.items():
        assert known.all(), f"{name}: no rank has saved a part of it"
    return whole


class Jobs:
    """Runs jobs in folders of their own under ``folder``, one after the other."""

    def __init__(self, folder, data, shared=None):
        """Jobs of all that name the same folder ``shared`` are forked from one server."""
        self.folder, self.data = folder, data
        self.server = connect(shared or folder)

    def close(self):
        # Closing the stream is not enough: what the tests' process has forked may hold it open.
        print("end", file=self.server, flush=True)
        assert self.server.read() == ""
        self.server.close()

    def run(
        self,
        name,
        arguments="",
        ranks=1,
        *,
        common=COMMON,
        changes=(),
        environment=None,
        succeeds=True,
        timeout=120,
    ):
        """Run a job and return what came of it.

        ``arguments`` follow ``common`` on the command line; ``changes`` are names of functions that
        each rank calls before it starts.
        """
        folder = self.folder / name
        folder.mkdir(parents=True)
        data = f"--data-cache-path {self.folder / 'cache'}"
        if not re.search("--(mock-data|train-data-path)", arguments):
            data += f" --data-path {self.data}"
        job = {
            "folder": str(folder),
            "ranks": ranks,
            "arguments": shlex.split(f"{common} {data} --save {folder / 'checkpoints'} {arguments}"),
            "changes": list(changes),
            "environment": environment or {},
            "timeout": timeout,
        }
        finished = self.submit(job)
        if succeeds and any(finished.exit_codes):
            raise AssertionError(f"{name} ended with {finished.exit_codes}:\n{finished.log[-6000:]}")
        return finished

    def submit(self, job):
        """Run a job as the server takes it; return what came of it, failed or not, if no process is left."""
        print(json.dumps(job), file=self.server, flush=True)
        finished = Finished(Path(job["folder"]), **json.loads(self.server.readline()))
        if finished.left:
            raise AssertionError(
                f"{finished.folder.name} has left processes: {finished.left}:\n{finished.log[-6000:]}"
            )
        return finished
