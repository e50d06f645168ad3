"""What llama.cpp makes of a GGUF file, found out in a process of its own.

Run as a script in that process, by a Python that has llama-cpp-python or cyllama; it imports nothing else but
numpy. It reads a JSON object from stdin: ``file``, ``texts``, ``special`` (whether special tokens in a text
are taken for such), ``tokens``, and ``positions``: for how many of them, the last, logits are wanted. The
last line of its output is a JSON object: ``runtime``, and ``ids`` and ``logits``, or ``error``.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

__all__: list[str] = []


def _by_llama_cpp_python(
    file: str, texts: list[str], special: bool, tokens: list[int], positions: int
) -> dict[str, Any]:
    # One of the two is there.
    from llama_cpp import GGML_TYPE_F32, Llama  # type: ignore[import-not-found, unused-ignore]

    settings = {"n_ctx": max(64, len(tokens)), "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    model = Llama(file, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False, **settings)
    ids = [model.tokenize(text.encode(), add_bos=True, special=special) for text in texts]
    model.eval(tokens)
    return {"ids": ids, "logits": model.scores[: len(tokens)][-positions:].tolist()}


def _by_cyllama(
    file: str, texts: list[str], special: bool, tokens: list[int], positions: int
) -> dict[str, Any]:
    # One of the two is there.
    from cyllama.llama import llama_cpp  # type: ignore[import-not-found, unused-ignore]

    llama_cpp.disable_logging()
    model = llama_cpp.LlamaModel(file, llama_cpp.LlamaModelParams(), verbose=False)
    vocabulary = model.get_vocab()
    ids = [list(vocabulary.tokenize(text, True, special)) for text in texts]
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, len(tokens))
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
    settings.flash_attn_type = 0  # which rounds to 16 bits
    context = llama_cpp.LlamaContext(model, settings, verbose=False)
    batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    batch.add_sequence(tokens, 0, True)
    context.decode(batch)
    wanted = range(len(tokens))[-positions:]
    return {"ids": ids, "logits": [list(context.get_logits_ith(at)) for at in wanted]}


def _main() -> None:
    asked = json.load(sys.stdin)
    if find_spec("llama_cpp"):
        name, run = "llama-cpp-python", _by_llama_cpp_python
    else:
        name, run = "cyllama", _by_cyllama
    try:
        found = run(**asked)
    except Exception as error:  # each of the two has its own; which is told to the user
        found = {"error": f"{type(error).__name__}: {error}"}
    with suppress(ImportError):  # a source folder on the path
        name = f"{name} {version(name)}"
    print("\n" + json.dumps({"runtime": name, **found}))


if __name__ == "__main__":
    _main()
