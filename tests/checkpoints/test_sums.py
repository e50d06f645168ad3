"""Files are summed while they are written."""

import os
import zlib

import pytest

from megatron_periln.checkpoints import sums
from megatron_periln.checkpoints.manifest import BrokenCheckpointError, Manifest
from tests.checkpoints.damage import flip_a_bit


def test_what_is_written_is_summed_in_passing(tmp_path):
    path, pieces = tmp_path / "x.distcp", [b"head", os.urandom(5 << 20), b"", memoryview(b"tail" * 3)]
    with sums.open_summed(str(path), "wb") as stream:
        for piece in pieces:
            stream.write(piece)
    whole = b"".join(map(bytes, pieces))
    assert path.read_bytes() == whole
    assert (
        sums.read_sidecar(path)
        == (len(whole), f"{zlib.crc32(whole):08x}")
        == (len(whole), sums.sum_file(path))
    )


def test_a_sum_taken_in_passing_finds_what_the_disk_lost(tmp_path):
    path = tmp_path / "x.distcp"
    with sums.open_summed(str(path), "wb") as stream:
        stream.write(b"content")
    flip_a_bit(path)
    manifest = Manifest.of(tmp_path, sums=True)
    with pytest.raises(BrokenCheckpointError, match="checksum"):
        manifest.check_sums(tmp_path)
    os.truncate(path, 3)
    with pytest.raises(BrokenCheckpointError, match="has 3 bytes instead of 7"):
        Manifest.of(tmp_path, sums=True)


def test_a_file_that_is_not_written_in_order_is_not_summed_in_passing(tmp_path):
    path = tmp_path / "x.distcp"
    with sums.open_summed(str(path), "wb") as stream:
        stream.write(b"content")
        stream.seek(0)
        stream.write(b"C")
    assert sums.read_sidecar(path) is None
    assert Manifest.of(tmp_path, sums=True).files[0].crc32 == f"{zlib.crc32(b'Content'):08x}"
