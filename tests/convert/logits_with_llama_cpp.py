"""Run by another Python: models of transformers, converted to GGUF in fp32, in llama.cpp.

Arguments: the source of llama-cpp-python, with its library; a file of tokens ``[batch, sequence]`` (.npy);
how many tokens to continue each row by; then pairs of a model's folder and the file (.npz) for its logits
and greedy tokens.
"""

import runpy
import sys
from pathlib import Path
from unittest import mock

import numpy as np

source, tokens, count = Path(sys.argv[1]), np.load(sys.argv[2]), int(sys.argv[3])
upstream = source / "vendor" / "llama.cpp"
sys.path[:0] = [str(source), str(upstream)]
from conversion.base import TextModel  # noqa: E402
from llama_cpp import GGML_TYPE_F32, Llama  # noqa: E402

# The converter knows tokenizers by what they make of a text, and refuses those that it has not seen.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"


def convert(folder, gguf):
    arguments = [folder, "--outtype", "f32", "--outfile", gguf]
    with mock.patch.object(sys, "argv", ["convert_hf_to_gguf.py", *arguments]):
        runpy.run_path(str(upstream / "convert_hf_to_gguf.py"), run_name="__main__")


def run(gguf):
    """Return the logits of every row of tokens, and its greedy continuation with the cache."""
    model = Llama(
        gguf,
        n_ctx=64,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    logits, continued = [], []
    for row in tokens.tolist():
        model.reset()
        model.eval(row)
        logits.append(model.scores[: len(row)].copy())
        continued.append([int(logits[-1][-1].argmax())])
        for _ in range(count - 1):
            model.eval(continued[-1][-1:])
            continued[-1].append(int(model.scores[model.n_tokens - 1].argmax()))
    model.close()
    return {"logits": np.stack(logits), "continued": np.array(continued)}


for folder, output in zip(sys.argv[4::2], sys.argv[5::2], strict=True):
    gguf = f"{output}.gguf"
    convert(folder, gguf)
    np.savez(output, **run(gguf))
    Path(gguf).unlink()
