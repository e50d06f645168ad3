"""The Dockerfile, built by a real engine on a stand-in for NVIDIA's image."""

from __future__ import annotations

import json
import site
import subprocess

import pytest

from tests.docker.conftest import KEPT, ROOT

WORKDIR = "/workspace/megatron-periln"
VERSIONS = """
import json
from importlib.metadata import distributions
print(json.dumps({found.metadata["Name"].lower(): found.version for found in distributions()}))
"""
NOBODY = ["--rm", "--network", "none", "--user", "12345:54321"]


@pytest.fixture(scope="module")
def image(docker, bases, build):
    """Built where the image's own constraints ask for another numpy than ours do."""
    build(bases("complete", KEPT, {}, f"torch=={KEPT['torch']}\nnumpy==2.4.0\n"), "megatron-periln:test")
    yield "megatron-periln:test"
    docker("image", "rm", "--force", "megatron-periln:test")


@pytest.fixture(scope="module")
def versions(docker, image):
    return json.loads(docker("run", *NOBODY, image, "python", "-c", VERSIONS).stdout)


def test_the_image_s_own_packages_are_kept(versions):
    assert {name: versions[name] for name in KEPT} == KEPT
    assert not any(name.startswith("nvidia-") for name in versions)


def test_constraints(versions):
    """Ours, except where the image has its own."""
    assert versions["numpy"] == "2.4.0"
    pinned = dict(
        line.split(" ")[0].split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
    )
    ours = {
        name: version for name, version in versions.items() if name in pinned and name not in (*KEPT, "numpy")
    }
    assert {"megatron-core", "transformers", "pyarrow", "tiktoken"} <= set(ours)
    assert ours == {name: pinned[name] for name in ours}


def test_sources(docker, image):
    """All that git has of them, and nothing else but compiled files."""
    copied = [
        "LICENSE",
        "README.md",
        "constraints.txt",
        "examples",
        "megatron_periln",
        "pyproject.toml",
        "tools",
    ]
    tracked = subprocess.run(
        ["git", "ls-files", *copied], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = docker("run", *NOBODY, image, "find", ".", "-type", "f").stdout.split()
    there = {
        path.removeprefix("./") for path in found if "__pycache__" not in path and ".egg-info" not in path
    }
    assert there == set(tracked.stdout.split())
    assert "./megatron_periln/__pycache__/pretrain.cpython-312.pyc" in found


def test_the_doctor_is_the_default(docker, image):
    """For any user, without network; it says that there is no GPU, and that this torch is none."""
    done = docker("run", *NOBODY, image, succeeds=False)
    assert "Traceback" not in done.stderr
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert KEPT["torch"] in rows["torch"] and " ok " in rows["torch"]
    assert KEPT["transformer-engine"] in rows["Transformer Engine"]
    assert " ok " in rows["requirements"]
    assert " failed " in rows["CUDA"] and " failed " in rows["GPU health"]
    assert "error: " in done.stderr and ": GPU health: nvidia-smi is not there" in done.stderr


def test_a_home_for_any_user(docker, image):
    code = (
        "import getpass, pathlib; home = pathlib.Path.home(); (home / '.cache').mkdir();"
        "(home / '.cache' / 'x').touch(); print(getpass.getuser(), home)"
    )
    assert docker("run", *NOBODY, image, "python", "-c", code).stdout.split() == ["trainer", "/home/trainer"]


TRAINING = """--device cpu --norm-placement peri --num-layers 2 --hidden-size 32 --num-attention-heads 2
    --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 1 --lr 1e-3
    --train-iters 2 --mock-data --tokenizer-type NullTokenizer --vocab-size 64 --eval-iters 0
    --eval-interval 100 --log-interval 1 --save-interval 2 --num-workers 0
    --save /tmp/save --load /tmp/save"""


def test_with_this_machine_s_torch(docker, image):
    """The doctor finds the container fit, and a model is trained and saved, by any user, without network."""
    packages = site.getsitepackages()[0]
    environment = ["PYTHONPATH=/packages", "OMP_NUM_THREADS=1", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=29500"]
    mounted = ["--volume", f"{packages}:/packages:ro", *(f"--env={variable}" for variable in environment)]
    command = f"python -m megatron_periln.doctor {TRAINING} && python -m megatron_periln.pretrain {TRAINING}"
    without = f"FROM {image}\nRUN python -m pip uninstall --yes torch transformer-engine apex\n"
    docker("build", "--network", "none", "--tag", "stand-in:without", "-", input=without)
    done = docker("run", *NOBODY, *mounted, "stand-in:without", "sh", "-c", " ".join(command.split()))
    assert " failed " not in done.stdout
    assert "iteration        2/       2" in done.stdout


def test_a_dependency_that_replaces_torch(bases, build, image):
    """The base's torch is older than pyproject.toml allows: pip takes a newer one, and the build fails."""
    base = bases("old", {"torch": "2.10.0"}, {"torch": "2.99.0"}, start=image)
    done = build(base, "megatron-periln:replaced", succeeds=False)
    assert "torch 2.10.0 -> 2.99.0" in done.stdout + done.stderr


def test_the_image_forbids_it(bases, build, image):
    """By its PIP_CONSTRAINT, which pip heeds beside ours."""
    base = bases("strict", {"torch": "2.10.0"}, {"torch": "2.99.0"}, "torch==2.10.0\n", start=image)
    done = build(base, "megatron-periln:forbidden", succeeds=False)
    assert "torch>=2.11" in done.stdout + done.stderr and "2.10.0" in done.stdout + done.stderr


def test_a_base_without_torch(bases, build):
    done = build(bases("bare", {}, {}), "megatron-periln:bare", succeeds=False)
    assert "error: BASE_IMAGE has no torch" in done.stdout + done.stderr
