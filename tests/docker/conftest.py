"""A container engine: the one that answers here, or one started for the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docker.stand_in import root_file_system, wheel

ROOT = Path(__file__).parents[2]
WANTED = "MEGATRON_PERILN_TEST_DOCKER"
# As NVIDIA's images call theirs.
KEPT = {"torch": "2.13.0a0+5228986c39.nv26.6", "transformer-engine": "2.16.0+66f2d2b", "apex": "0.1"}

Docker = Callable[..., subprocess.CompletedProcess]


def pytest_collection_modifyitems(items):
    if WANTED not in os.environ:
        for item in items:
            if item.path.parent.name == "docker":
                item.add_marker(pytest.mark.skip(reason="takes minutes and an engine: make test-docker"))


@pytest.fixture(scope="session")
def docker(tmp_path_factory) -> Iterator[Docker]:
    """Run docker with these arguments, and return what came of it."""
    if shutil.which("docker") is None:
        pytest.skip("there is no container engine here: docker is not on PATH")
    answers = subprocess.run(["docker", "version"], capture_output=True).returncode == 0
    folder = Path(os.environ.get(f"{WANTED}_FOLDER") or tmp_path_factory.mktemp("docker"))
    server = None if answers else _start_server(folder)
    host = {} if server is None else {"DOCKER_HOST": f"unix://{folder}/socket"}

    def run(*arguments: object, succeeds: bool | None = True, **options: object):
        command = ["docker", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **host}, **options)
        assert succeeds is None or (done.returncode == 0) == succeeds, (
            done.stdout[-6000:] + done.stderr[-6000:]
        )
        return done

    try:
        for _ in range(100):
            if run("version", succeeds=None).returncode == 0:
                break
            if server is not None and server.poll() is not None:
                pytest.skip(f"no container engine can run here: {(folder / 'log').read_text()[-500:]}")
            time.sleep(0.3)
        yield run
    finally:
        if server is not None:
            server.terminate()
            server.wait()


def _start_server(folder: Path) -> subprocess.Popen:
    server = shutil.which("dockerd")
    if server is None or os.geteuid() != 0:
        pytest.skip("there is no container engine here: none answers, and only root can start dockerd")
    flags = f"""--data-root {folder}/data --exec-root {folder}/exec --pidfile {folder}/pid
        --host unix://{folder}/socket --bridge=none --iptables=false --ip-forward=false"""
    with (folder / "log").open("w") as log:
        return subprocess.Popen([server, *flags.split()], stdout=log, stderr=log)


@pytest.fixture(scope="session")
def bases(docker: Docker, tmp_path_factory) -> Iterator[Callable[..., str]]:
    """Make a stand-in for the base image that has these packages; return its name."""
    folder = tmp_path_factory.mktemp("base")
    root_file_system(folder / "root.tar")
    docker("import", "--change", "ENV PATH=/usr/bin", folder / "root.tar", "stand-in:python")
    (folder / "root.tar").unlink()

    def make(
        tag: str,
        packages: dict[str, str],
        offered: dict[str, str],
        constraints: str = "",
        start: str = "stand-in:python",
    ) -> str:
        context = folder / tag
        for name, versions in {"installed": packages, "offered": offered}.items():
            (context / name).mkdir(parents=True)
            for package, version in versions.items():
                wheel(context / name, package, version)
        (context / "constraint.txt").write_text(constraints)
        lines = [
            f"FROM {start}",
            "COPY constraint.txt /etc/pip/constraint.txt",
            "COPY offered /offered",
        ]
        if packages:
            lines += [
                f"COPY installed /{tag}",
                f"RUN python -m pip install --no-index --no-deps /{tag}/*",
            ]
        lines += ["ENV PIP_CONSTRAINT=/etc/pip/constraint.txt PIP_FIND_LINKS=/offered"]
        (context / "Dockerfile").write_text("\n".join([*lines, ""]))
        docker("build", "--network", "none", "--tag", f"stand-in:{tag}", context)
        return f"stand-in:{tag}"

    yield make
    images = docker("images", "--quiet", "stand-in").stdout.split()
    docker("image", "rm", "--force", *set(images))


@pytest.fixture(scope="session")
def build(docker: Docker, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """Build the Dockerfile on a base, in a clean copy of the sources with what .dockerignore leaves out."""
    context = tmp_path_factory.mktemp("context") / "sources"
    ignored = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "runs", "local", "*.egg-info")
    shutil.copytree(ROOT, context, ignore=ignored, symlinks=True)
    for name in (".venv/bin/python", ".git/HEAD", "runs/quickstart/report.html", "tools/__pycache__/x.pyc"):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).touch()

    def run(base: str, tag: str, succeeds: bool = True) -> subprocess.CompletedProcess:
        argument = f"BASE_IMAGE={base}"
        return docker(
            "build", "--network", "host", "--build-arg", argument, "--tag", tag, context, succeeds=succeeds
        )

    return run
