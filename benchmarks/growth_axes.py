"""What grows, for growth.py: how an input of a size is made, and what is run on it."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_periln.studies.run_folder import RunFolder
from megatron_periln.studies.study import read_study

__all__ = ["AXES", "PREPROCESS", "WORDS", "Axis", "documents"]

LINE = 100
SMALL_MODEL = (
    "--num-layers 16 --hidden-size 512 --num-attention-heads 8 --seq-length 512 "
    "--max-position-embeddings 512 --tokenizer-type NullTokenizer --vocab-size 32000 --mock-data "
    "--norm-placement peri --bf16 --micro-batch-size 1 --global-batch-size 8000 --lr 1e-3 --train-iters 200 "
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --sequence-parallel"
)
WORDS = "a few words of a text that goes on, and some more of them in a sentence.\n"


@dataclass(frozen=True)
class Axis:
    """What grows.

    Parameters
    ----------
    name
        What there is more of.
    smallest
        The first of the sizes.
    make
        Makes the input of a size in a folder.
    arguments
        Of Python, which is run in a checkout; ``{folder}`` and ``{size}`` are replaced.
    stock
        The same of Megatron's, where it has a tool or code for that.
    stock_name
        Whose that is.
    prepare
        The same of what is run before it, and not measured: what depends on the checkout.
    changed
        Whether what is run changes the input, so that each needs its own.
    """

    name: str
    smallest: int
    make: Callable[[Path, int], None]
    arguments: tuple[str, ...]
    stock: tuple[str, ...] = ()
    stock_name: str = "Megatron's"
    prepare: tuple[str, ...] = ()
    changed: bool = False


def small_files(folder: Path, size: int) -> None:
    """Write JSON Lines of one document each."""
    for number in range(size):
        (folder / f"part_{number:07d}.jsonl").write_text(json.dumps({"text": WORDS}) + "\n")


def documents(folder: Path, size: int) -> None:
    """Write one file of documents."""
    with (folder / "in.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": f"{number} {WORDS}"}) + "\n" for number in range(size))


def long_document(folder: Path, size: int) -> None:
    """Write one document of so many kB."""
    text = (WORDS * (size * 1000 // len(WORDS) + 1))[: size * 1000]
    (folder / "in.jsonl").write_text(json.dumps({"text": text}) + "\n")


def row_group(folder: Path, size: int) -> None:
    """Write a Parquet file of one row group of so many MB."""
    import pyarrow
    from pyarrow import parquet

    words = [f"w{number:05d}" for number in range(1 << 16)]
    draws = np.random.default_rng(0).integers(0, len(words), (size * 100, 1400))
    texts = [" ".join(words[at] for at in row) for row in draws]
    parquet.write_table(pyarrow.table({"text": texts}), folder / "in.parquet", row_group_size=len(texts))


def dataset(prefix: Path, documents: int) -> None:
    """Write an indexed dataset without a sidecar, as Megatron's tool does."""
    from dataset_startup import write_dataset

    write_dataset(prefix, documents, 0)


def prefixes(folder: Path, size: int, documents: int = 200) -> None:
    """Write so many datasets of 200 documents."""
    dataset(folder / "data-0", documents)
    size_of_bin = (folder / "data-0.bin").stat().st_size
    for number in range(1, size):
        shutil.copy(folder / "data-0.idx", folder / f"data-{number}.idx")
        with (folder / f"data-{number}.bin").open("wb") as stream:
            stream.truncate(size_of_bin)


def blend(folder: Path, size: int) -> None:
    """Write so many datasets of 5,000 documents: of fewer Megatron's split leaves no test."""
    prefixes(folder, size, 5000)


def one_prefix(folder: Path, size: int) -> None:
    """Write a dataset of so many documents."""
    dataset(folder / "data-0", size)


def ten_prefixes(folder: Path, _: int) -> None:
    """Write ten datasets."""
    blend(folder, 10)


def checkpoint(folder: Path, size: int) -> None:
    """Write files of a checkpoint, with their sums as the writer leaves them."""
    for number in range(size):
        path = folder / f"__{number}_0.distcp"
        path.write_bytes(b"0" * 64)
        path.with_name(f"{path.name}.crc32").write_text("64 00000000")


def checkpoints(folder: Path, size: int) -> None:
    """Write checkpoints of eleven files."""
    for number in range(1, size + 1):
        (path := folder / f"iter_{number:07d}").mkdir()
        for file in (".metadata", *(f"__{part}_0.distcp" for part in range(10))):
            (path / file).touch()


def journal(folder: Path, size: int) -> None:
    """Write what a run of so many chunks leaves when it is killed."""
    (partial := folder / "out.partial").mkdir()
    write_journal(partial, size, "{}")


def write_journal(partial: Path, size: int, identity: str) -> None:
    """Write the same of a run whose bytes are decided by ``identity``."""
    (partial / "run.json").write_text(identity)
    arrays = [np.arange(100, dtype=np.uint16), np.array([60, 40], np.int32), np.array([1, 1], np.int64)]
    checksum = 0
    for suffix, array in zip((".bin", ".lengths", ".documents"), arrays, strict=True):
        checksum = zlib.crc32(array.tobytes(), checksum)
        (partial / f"text_00000{suffix}").write_bytes(array.tobytes() * size)
    chunk = {
        "sizes": {"text": [100, 2, 2]},
        "checksums": {"text": checksum},
        "empty": {"text": 0},
        "bytes": 600,
        "weight": 600,
        "left_out": {},
        "bad": [],
    }
    with (partial / "journal").open("w") as stream:
        stream.writelines(json.dumps({"number": number, **chunk}) + "\n" for number in range(size))


def lines(folder: Path, size: int) -> None:
    """Write lines of `LINE` bytes each."""
    line = json.dumps({"text": ""}) + "\n"
    text = json.dumps({"text": "x" * (LINE - len(line))}) + "\n"
    (folder / "in.jsonl").write_text(text * size)


def run_of_steps(folder: Path, size: int) -> None:
    """Write a monitor's file of so many steps, the layers of each hundredth, and an alert for each."""
    draw = random.Random(0).random
    header = {
        **{
            "kind": "run",
            "schema": 1,
            "iteration": 0,
            "version": "0.1.0",
            "name": "run",
            "placement": "peri",
        },
        **{"num_layers": 12, "hidden_size": 256, "parameters": 10**7, "flags": {}, "started": "2026-01-01"},
    }
    names = ("stream_variance", "stream_max_abs", "angular_distance", "attention_ratio")
    names += ("attention_gradient_norm", "mlp_gradient_norm")
    with (folder / "monitor.jsonl").open("w") as stream:
        stream.write(json.dumps(header) + "\n")
        for at in range(1, size + 1):
            step = {"loss": 3 + draw(), "grad_norm": draw(), "learning_rate": 1e-3, "tokens": 65536}
            line = {"kind": "step", "iteration": at, **step, "seconds": 0.5 + draw() / 100}
            stream.write(json.dumps(line) + "\n")
            if at % 100 == 0:
                values = {name: [round(draw(), 6) for _ in range(14)] for name in names}
                line = {"kind": "layers", "iteration": at, "layers": list(range(14)), **values}
                alert = {"kind": "alert", "iteration": at, "alert": "loss-spike", "message": "a spike"}
                stream.write(
                    json.dumps(line) + "\n" + json.dumps({**alert, "layer": None, "value": 1.0}) + "\n"
                )


def study(folder: Path, size: int) -> None:
    """Write a study of so many runs, each trained for 200 steps."""
    path = folder / "study.yaml"
    path.write_text(f"flags: {SMALL_MODEL}\nseeds: {list(range(size))}\n")
    run_of_steps(folder, 200)
    record = (folder / "monitor.jsonl").read_bytes()
    for run in read_study(path).runs():
        of = RunFolder(folder / "runs" / run.name, run)
        of.path.mkdir(parents=True)
        of.record.write_bytes(record)
        of.log.write_text("")
        of.begin({})
        of.end(0, None)


def nothing(folder: Path, size: int) -> None:
    """Make no input."""


PREPROCESS = (
    "tools/preprocess_data.py",
    *("--input", "{folder}", "--output-prefix", "{out}/data", "--workers", "1", "--overwrite"),
    *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{tokenizer}", "--append-eod"),
)
_MERGE = ("tools/merge_datasets.py", "--input", "{folder}", "--output-prefix", "{out}/merged")
_REPORT = ("tools/report.py", "{folder}", "--output", "{out}/report.html")

_STOCK_MERGE = """import sys; from pathlib import Path; import numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
folder, out = map(Path, sys.argv[1:])
builder = IndexedDatasetBuilder(str(out / "merged.bin"), dtype=numpy.uint16)
for path in sorted(folder.glob("*.idx")):
    builder.add_index(str(path.with_suffix("")))
builder.finalize(str(out / "merged.idx"))"""
_START = """import sys; from argparse import Namespace; from pathlib import Path
import dataset_startup
folder, out, code, samples = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
dataset_startup.prepare("cpu")
paths = [path.with_suffix("") for path in sorted(folder.glob("*.idx"))]
dataset_startup.launch_arguments(Namespace(seq_length=128, device="cpu"), paths, out / "cache")
getattr(dataset_startup, code)([samples, max(1, samples // 100), 1])"""
_MANIFEST = """import sys; from pathlib import Path
from megatron_periln.checkpoints.manifest import Manifest
folder = Path(sys.argv[1]); Manifest.of(folder, sums=True).write(folder)"""
_TIDY = """import sys; from pathlib import Path
from megatron_periln.checkpoints.guard import tidy
tidy(Path(sys.argv[1]))"""
_PARTIAL_OUTPUTS = """try:
    from megatron_periln.data.preprocess import partial_outputs, plan
    PartialOutputs = partial_outputs.PartialOutputs
except ImportError:  # before these had folders
    from megatron_periln.data import outputs, plan
    PartialOutputs = outputs.Outputs
"""
_JOURNAL = f"""import sys; from pathlib import Path; import numpy
{_PARTIAL_OUTPUTS}
outputs = PartialOutputs(Path(sys.argv[1]) / "out.partial", numpy.dtype(numpy.uint16), {{}})
outputs.open(resume=True, overwrite=False)
if hasattr(outputs, "newly_final"):
    list(outputs.newly_final())
outputs.close()
assert len(outputs.records) == int(sys.argv[2])"""
# The tool with chunks of a line each, which are else of 4 MB.
_IN_LINES = f"""import runpy, sys; from pathlib import Path
{_PARTIAL_OUTPUTS}
_, checkout, size, *sys.argv = sys.argv
plan.CHUNK_BYTES = plan._CHUNK_BYTES = {LINE}
"""
_RUN = "runpy.run_path(str(Path(checkout, sys.argv[0])), run_name='__main__')"
_KILLED = f"""{_IN_LINES}
import json; from growth_axes import write_journal
def killed(outputs, **_):
    outputs.folder.mkdir()
    write_journal(outputs.folder, int(size), json.dumps({{**outputs._identity, "encoder": None}}))
    raise SystemExit
PartialOutputs.open = killed
{_RUN}"""
_ROWS = """import sys; from pathlib import Path
from megatron_periln.data.readers.inputs import find_inputs
from megatron_periln.data.readers.shared_buffers import lending
from megatron_periln.data.readers.tasks import cut_into_sources
from megatron_periln.data.readers.together import together
characters = 0
with lending(4, 16 << 20):
    for source in together(cut_into_sources(find_inputs([sys.argv[1]]), ["text"], 4 << 20), 4 << 20):
        for chunk in source.chunks(1 << 28):
            characters += sum(len(document.content["text"]) for document in chunk.raw_documents(1 << 28))
print(characters)"""
_PYARROW = """import sys; from pathlib import Path; from pyarrow.parquet import ParquetFile
characters = 0
for path in Path(sys.argv[1]).iterdir():
    for batch in ParquetFile(path).iter_batches(columns=["text"], use_threads=False):
        characters += sum(len(row["text"]) for row in batch.to_pylist())
print(characters)"""
_RESUMED_MONITOR = """import json, sys; from pathlib import Path
from megatron_periln.monitor.record import RunRecord
path = Path(sys.argv[1]) / "monitor.jsonl"
with path.open() as stream:
    header = json.loads(stream.readline())
RunRecord.open(path, header, int(sys.argv[2])).close()"""
_LAYERS = """import sys; from pathlib import Path
from megatron.training import global_vars
from torch.utils.tensorboard import SummaryWriter
from megatron_periln.monitor.record import RunRecord
try:
    from megatron_periln.monitor.statistics import STATISTICS
except ImportError:  # before these had a file
    from megatron_periln.monitor.schema import STATISTICS
from megatron_periln.monitor.tensorboard import Board
out, layers = Path(sys.argv[1]), list(range(int(sys.argv[2])))
global_vars._GLOBAL_TENSORBOARD_WRITER = SummaryWriter(str(out / "tensorboard"))
names = "version name placement num_layers hidden_size parameters flags started".split()
record, board = RunRecord.open(out / "monitor.jsonl", dict.fromkeys(names), 0), Board()
for interval in range(1, 21):
    values = {name: [1.0 + layer / interval for layer in layers] for name in STATISTICS}
    record.layers(interval, layers, values); board.layers(interval, layers, values)"""


def _start(code: str, samples: str = "10000") -> tuple[str, ...]:
    return ("-c", _START, "{folder}", "{out}", code, samples)


# Without what looks for a checkout's missing modules in the one that is installed.
_MODULE = """import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)"""
_STUDY = (
    *("-c", _MODULE, "megatron_periln.studies", "{folder}/study.yaml"),
    *("--output", "{folder}/runs", "--collect"),
)
_PLAN = (
    *("-c", _MODULE, "megatron_periln.plan", "--world-size", "{size}", "--no-changes", "--brief"),
    *SMALL_MODEL.split(),
)
_LINES = ("-c", _IN_LINES + _RUN, "{checkout}", "{size}")
_BLEND, _STOCK_BLEND = _start("ours"), _start("stock")

AXES = (
    Axis("small input files", 100, small_files, PREPROCESS),
    Axis("documents", 10_000, documents, PREPROCESS),
    Axis("kB of one document, tokenizers", 100, long_document, (*PREPROCESS, "--encoder", "tokenizers")),
    Axis("kB of one document, gigatoken", 1000, long_document, (*PREPROCESS, "--encoder", "gigatoken")),
    Axis("MB of a Parquet row group", 2, row_group, PREPROCESS),
    Axis(
        "MB of a Parquet row group, read as texts",
        4,
        row_group,
        ("-c", _ROWS, "{folder}"),
        ("-c", _PYARROW, "{folder}"),
        "pyarrow's, once",
    ),
    Axis("chunks of a journal, opened", 1000, journal, ("-c", _JOURNAL, "{folder}", "{size}"), changed=True),
    Axis(
        "chunks of a journal, the tool resumed",
        1000,
        lines,
        (*_LINES, *PREPROCESS, "--resume"),
        prepare=("-c", _KILLED, *_LINES[2:], *PREPROCESS),
    ),
    Axis(
        "files, each a dataset (--max-bin-size)",
        10,
        small_files,
        (*_LINES, *PREPROCESS, "--max-bin-size", "1"),
    ),
    Axis("datasets, merged", 10, prefixes, _MERGE, ("-c", _STOCK_MERGE, "{folder}", "{out}")),
    Axis("documents, training's start", 50_000, one_prefix, _BLEND, _STOCK_BLEND),
    Axis("prefixes, training's start", 10, blend, _BLEND, _STOCK_BLEND),
    Axis(
        "samples of a blend of ten, training's start",
        10_000,
        ten_prefixes,
        *(_start("ours", "{size}"), _start("stock", "{size}")),
    ),
    Axis("files of a checkpoint, manifest", 100, checkpoint, ("-c", _MANIFEST, "{folder}"), changed=True),
    Axis("checkpoints, tidied", 10, checkpoints, ("-c", _TIDY, "{folder}")),
    Axis("layers, 20 recorded intervals with TensorBoard", 6, nothing, ("-c", _LAYERS, "{out}", "{size}")),
    Axis(
        "steps, monitor's file resumed",
        10_000,
        run_of_steps,
        ("-c", _RESUMED_MONITOR, "{folder}", "{size}"),
        changed=True,
    ),
    Axis("steps, report", 10_000, run_of_steps, _REPORT),
    Axis("runs of a study, their table", 30, study, _STUDY),
    Axis("ranks, planned", 80, nothing, _PLAN),
)
"""All axes; a new one is a line here."""
