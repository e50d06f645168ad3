"""The wheel, in an environment of its own and without the checkout, does what the README shows."""

import contextlib
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[1]
UV = os.environ.get("MEGATRON_PERILN_UV")

pytestmark = pytest.mark.skipif(not UV, reason="MEGATRON_PERILN_UV names no uv; make test does")

MODEL = """
--num-layers 2
--hidden-size 64
--ffn-hidden-size 128
--num-attention-heads 4
--normalization RMSNorm
--swiglu
--disable-bias-linear
--position-embedding-type rope
--untie-embeddings-and-output-weights
--seq-length 32
--max-position-embeddings 32
--attention-dropout 0
--hidden-dropout 0
--train-iters 4
--micro-batch-size 4
--global-batch-size 4
--lr 1e-3
--eval-iters 0
--eval-interval 4
--log-interval 1
--split 100,0,0
--num-workers 0
--monitor-layers all
--save-interval 4
"""


class Installed:
    """An environment with the wheel, and a folder to work in."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self.environment, self.folder = environment, folder

    def run(self, command: str) -> str:
        """Run a program of the environment, and return what it printed."""
        program, *arguments = shlex.split(command)
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        ended = subprocess.run(
            [str(self.environment / "bin" / program), *arguments],
            **{"cwd": self.folder, "env": clean, "capture_output": True, "text": True, "check": False},
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
        return ended.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """From the sources as they stand, with the dependencies that the wheel names and no others."""
    base = tmp_path_factory.mktemp("wheel")
    uv = [str(UV), "--quiet"]
    source = base / "source"  # without what an earlier build may have left in the checkout
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron_periln", source / "megatron_periln", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # By the setuptools that is here, which need not be fetched into an environment of its own.
    build = ["build", "--wheel", "--no-build-isolation", "--python", sys.executable]
    subprocess.run([*uv, *build, "--out-dir", str(base), str(source)], check=True)
    (wheel,) = base.glob("*.whl")
    environment = base / "environment"
    subprocess.run([*uv, "venv", str(environment)], check=True)
    python = ["--python", str(environment / "bin" / "python"), "--constraints", str(ROOT / "constraints.txt")]
    install = [*uv, "pip", "install", *python, str(wheel)]
    if subprocess.run([*install, "--offline"], check=False).returncode:  # not all of it is in uv's cache
        subprocess.run(install, check=True)
    share_bytecode(environment)
    folder = base / "work"
    folder.mkdir()
    return Installed(environment, folder)


def share_bytecode(environment: Path) -> None:
    """Link what is compiled of the same files here, where links can be: 11 s to compile again.

    Python takes it only if its source is as old and as long.
    """
    here = Path(sysconfig.get_paths()["purelib"])
    (there,) = environment.glob("lib/python*/site-packages")
    with contextlib.suppress(OSError):
        for folder, inner, _ in os.walk(there):
            cache = here / Path(folder).relative_to(there) / "__pycache__"
            if "__pycache__" not in inner and cache.is_dir():
                shutil.copytree(cache, Path(folder, "__pycache__"), copy_function=os.link)
            inner[:] = [name for name in inner if name != "__pycache__"]


@pytest.fixture(scope="module")
def trained(installed: Installed) -> Installed:
    """Its folder has a tokenizer, a dataset, a monitored run and its checkpoint."""
    words, chance = ["norm", "layer", "peri", "output", "residual"], random.Random(7)
    texts = [" ".join(chance.choices(words, k=40)) for _ in range(60)]
    corpus = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (installed.folder / "corpus.jsonl").write_text(corpus)
    (installed.folder / "model.flags").write_text(MODEL)
    tokenizer = "--tokenizer-type SentencePieceTokenizer"
    installed.run(
        f"megatron-periln train-tokenizer {tokenizer} --input corpus.jsonl --vocab-size 300 --output t.model"
    )
    tokenizer += " --tokenizer-model t.model"
    installed.run(
        f"megatron-periln preprocess-data --input corpus.jsonl --output-prefix c --append-eod {tokenizer}"
    )
    installed.run(
        f"torchrun --nproc-per-node 1 --master-port {free_port()} -m megatron_periln.pretrain --device cpu "
        f"@model.flags --norm-placement peri --data-path c_text_document --save checkpoints {tokenizer}"
    )
    return installed


def test_it_is_not_the_checkout(installed: Installed) -> None:
    where = installed.run('python -c "import megatron_periln; print(megatron_periln.__file__)"')
    assert where.startswith(f"{installed.environment}/")


def test_it_trains_on_what_it_preprocessed(trained: Installed) -> None:
    assert (trained.folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_its_export_is_loaded_by_transformers(trained: Installed) -> None:
    trained.run("megatron-periln export-hf --load checkpoints --output model")
    load = "from transformers import AutoModelForCausalLM as Model; model = Model.from_pretrained('model')"
    assert int(trained.run(f'python -c "{load}; print(model.num_parameters())"')) > 60_000


def test_its_report_is_one_page(trained: Installed) -> None:
    trained.run("megatron-periln report checkpoints --output report.html")
    assert "</html>" in (trained.folder / "report.html").read_text()


def test_its_doctor_finds_the_machine_fit(trained: Installed) -> None:
    found = json.loads(trained.run("megatron-periln doctor --device cpu --save checkpoints --json"))
    assert found["fit"] and {row["check"] for row in found["rows"]} > {"megatron-core", "save folder"}
