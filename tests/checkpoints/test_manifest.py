"""Files that were changed, cut off or lost are found."""

import os
import zlib

import pytest

from megatron_periln.checkpoints.manifest import MANIFEST, BrokenCheckpointError, Manifest
from tests.checkpoints.damage import flip_a_bit

CONTENT = {"a.distcp": os.urandom(3 << 20), "b.distcp": b"", "inner/c.pt": b"c" * 1000}


@pytest.fixture
def folder(tmp_path):
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    Manifest.of(tmp_path, sums=True).write(tmp_path)
    return tmp_path


def test_what_is_there_is_described(folder):
    manifest = Manifest.read(folder)
    described = {entry.name: (entry.size, entry.crc32) for entry in manifest.files}
    assert described == {name: (len(data), f"{zlib.crc32(data):08x}") for name, data in CONTENT.items()}
    assert manifest.size == sum(map(len, CONTENT.values()))
    manifest.check_sizes(folder)
    manifest.check_sums(folder)


@pytest.mark.parametrize("name", ["a.distcp", "inner/c.pt"])
def test_a_flipped_bit_is_found(folder, name):
    flip_a_bit(folder / name)
    manifest = Manifest.read(folder)
    manifest.check_sizes(folder)
    with pytest.raises(BrokenCheckpointError, match=rf"{name} has checksum \w+ instead of"):
        manifest.check_sums(folder)


def test_every_file_is_in_one_part(folder):
    for name in ("a.distcp", "inner/c.pt"):
        flip_a_bit(folder / name)
        found = []
        for part in range(3):
            try:
                Manifest.read(folder).check_sums(folder, part, 3)
            except BrokenCheckpointError as error:
                found.append(str(error).split()[0])
        assert found == [name]
        flip_a_bit(folder / name)


def test_a_cut_off_file_is_found_by_its_size(folder):
    os.truncate(folder / "a.distcp", 1 << 20)
    with pytest.raises(BrokenCheckpointError, match=r"a.distcp has 1,048,576 bytes instead of 3,145,728"):
        Manifest.read(folder).check_sizes(folder)


def test_a_lost_file_is_found(folder):
    (folder / "b.distcp").unlink()
    with pytest.raises(BrokenCheckpointError, match=r"b.distcp is missing"):
        Manifest.read(folder).check_sizes(folder)


def test_a_cut_off_manifest_is_found(folder):
    os.truncate(folder / MANIFEST, 100)
    with pytest.raises(BrokenCheckpointError, match=r"manifest.json can't be read"):
        Manifest.read(folder)


def test_without_a_manifest(tmp_path):
    assert Manifest.read(tmp_path) is None


def test_without_sums(folder):
    Manifest.of(folder, sums=False).write(folder)
    manifest = Manifest.read(folder)
    assert not manifest.has_sums
    flip_a_bit(folder / "a.distcp")
    manifest.check_sums(folder)
