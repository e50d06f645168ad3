"""TensorBoard's event files get their checksums from numpy, and they are right."""

import inspect
import random

import pytest
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
from tensorboard.summary.writer import record_writer

from megatron_periln.monitor.checksums import crc32c, masked_crc32c
from megatron_periln.patches import training_loop


@pytest.mark.parametrize("length", [4, 5, 31, 32, 33, 63, 64, 1000, 4097, 70_001])
def test_checksums_are_those_of_tensorboard(length):
    data = random.Random(length).randbytes(length)
    assert crc32c(data) == pywrap_tensorflow.crc32c(data)


def test_the_published_check_value():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


@pytest.mark.parametrize("length", [0, 1, 8, 63, 64, 5000])
def test_records_of_any_length_are_masked_alike(monkeypatch, length):
    monkeypatch.setattr(record_writer, "masked_crc32c", pywrap_tensorflow.masked_crc32c)
    training_loop.sum_events_with(masked_crc32c)
    data = random.Random(length).randbytes(length)
    assert record_writer.masked_crc32c is not pywrap_tensorflow.masked_crc32c
    assert record_writer.masked_crc32c(data) == pywrap_tensorflow.masked_crc32c(data)


def test_upstream_still_sums_byte_by_byte_in_python():
    assert inspect.isfunction(pywrap_tensorflow.crc_update)
    assert "for b in buf" in inspect.getsource(pywrap_tensorflow.crc_update)
    assert inspect.getmodule(inspect.unwrap(record_writer.masked_crc32c)) is pywrap_tensorflow
