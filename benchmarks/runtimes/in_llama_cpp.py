"""llama.cpp, by tools/export_gguf.py; runs in this project's Python.

    in_llama_cpp.py JOBS SOURCE PYTHON

SOURCE is llama.cpp's, with the converter; PYTHON has cyllama.
"""

import re
import sys
from pathlib import Path

from child import answer

from megatron_periln import cpu

cpu.activate(hide_gpu=True)
from megatron_periln.convert.gguf.processes import LlamaCpp  # noqa: E402
from megatron_periln.convert.gguf.write import GGUFOptions, write_gguf  # noqa: E402

LLAMA_CPP = LlamaCpp.find(Path(sys.argv[2]), sys.argv[3])


def gguf(job):
    """Return what the tool says of ids and logits."""
    said = []
    options = GGUFOptions(llama_cpp=LLAMA_CPP, kind="f32")
    write_gguf(Path(job["folder"]), Path(job["work"]) / "model.gguf", options, say=said.append)
    largest = re.search(r"\(fp32\): (\S+) on", " ".join(said))
    return {"said": said, "largest": float(largest[1])}


answer((), gguf=gguf)
