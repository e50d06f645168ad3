"""Run by another Python: GGUF files in fp32, in llama.cpp.

Arguments: the source of llama-cpp-python, with its library; a file of tokens ``[batch, sequence]`` (.npy);
how many tokens to continue each row by; then pairs of a GGUF file and the file (.npz) for its logits and
greedy tokens. The GGUF files are removed.
"""

import sys
from pathlib import Path

import numpy as np

source, tokens, count = Path(sys.argv[1]), np.load(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = [str(source)]
from llama_cpp import GGML_TYPE_F32, Llama  # noqa: E402


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


for gguf, output in zip(sys.argv[4::2], sys.argv[5::2], strict=True):
    np.savez(output, **run(gguf))
    Path(gguf).unlink()
