"""Jobs whose checkpoints meet with an accident."""

import os
import shutil
import subprocess

import pytest

from tests.parallel.conftest import indexed_bytes, jobs  # noqa: F401


@pytest.fixture
def disk(tmp_path):
    """A disk of its own: the folder that it is mounted at."""
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    if os.geteuid() != 0 or not all(map(shutil.which, ("mkfs.ext4", "mount", "fsfreeze"))):
        pytest.skip("only root can mount a disk, with mkfs.ext4 and fsfreeze")
    folder.mkdir()
    with image.open("wb") as stream:
        stream.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
