"""The tool with small chunks that take a while: ``slow_preprocess.py BYTES SECONDS FLAG...``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.remove(str(Path(__file__).parent))  # which has a folder of the name of a library
sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_periln.command_line import run_command
from megatron_periln.data.preprocess import plan
from megatron_periln.data.preprocess.encode import ChunkEncoder, EncodedChunk
from megatron_periln.data.readers.tasks import Task
from megatron_periln.tools import preprocess_data

plan.CHUNK_BYTES = int(sys.argv.pop(1))
seconds = float(sys.argv.pop(1))
encode = ChunkEncoder.encode


def encode_slowly(self: ChunkEncoder, task: Task) -> EncodedChunk:
    time.sleep(seconds)
    return encode(self, task)


ChunkEncoder.encode = encode_slowly  # type: ignore[method-assign]

if __name__ == "__main__":
    run_command(preprocess_data.main)
