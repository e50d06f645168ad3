"""llama.cpp's converter, run in a process of its own with a pre-tokenizer that was chosen for it.

Run as a script in that process. Arguments: llama.cpp's folder, the model's, the vocabulary (``Vocabulary`` in
processes.py, in JSON), the pre-tokenizer's name, then the converter's own arguments.

Four things stand otherwise than in the converter:

- It knows a pre-tokenizer by a hash of what a whole vocabulary makes of one text, and so those of published
  models alone.
- For a GLM-4 it wants tokens ``<|endoftext|>`` and ``<|user|>``, and overrides the model's own end of a
  document with them.
- Where a tokenizer doesn't say whether texts get a token in front, nor does the file, and llama.cpp takes
  what the name of the pre-tokenizer stands for.
- Of a SentencePiece model it writes neither that a text gets no space in front, nor which pieces are
  user-defined, and so found whole.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

__all__: list[str] = []


def _main() -> None:
    llama_cpp, folder, described, name, *own = sys.argv[1:]
    vocabulary = json.loads(described)
    sys.path[:0] = [str(Path(llama_cpp) / "gguf-py"), llama_cpp]
    # llama.cpp's own modules, of the folder that the user names.
    import gguf  # type: ignore[import-not-found, unused-ignore]
    from conversion.base import TextModel  # type: ignore[import-not-found]
    from conversion.exaone import Exaone4Model  # type: ignore[import-not-found]
    from conversion.glm import Glm4Model  # type: ignore[import-not-found]
    from conversion.llama import LlamaModel  # type: ignore[import-not-found]
    from conversion.qwen import Qwen3Model  # type: ignore[import-not-found]

    def set_vocab(self: Any) -> None:
        if vocabulary["kind"] == "sentencepiece":
            self._set_vocab_sentencepiece()
            self.gguf_writer.add_add_space_prefix(vocabulary["space_prefix"])
        else:
            self._set_vocab_gpt2()

    for model in (Glm4Model, Exaone4Model, LlamaModel, Qwen3Model):
        model.set_vocab = set_vocab
    write = gguf.SpecialVocab.add_to_gguf

    def add_to_gguf(self: Any, *arguments: Any, **more: Any) -> None:
        self.add_special_token.update(zip(("bos", "eos"), vocabulary["adds"], strict=True))
        write(self, *arguments, **more)

    gguf.SpecialVocab.add_to_gguf = add_to_gguf
    pieces = TextModel._create_vocab_sentencepiece

    def create_vocab_sentencepiece(self: Any) -> Any:
        tokens, scores, kinds = pieces(self)
        for number in vocabulary["defined"]:  # which llama.cpp looks for in a text as it is
            tokens[number] = tokens[number].replace("▁".encode(), b" ")
            kinds[number] = gguf.TokenType.USER_DEFINED
        return tokens, scores, kinds

    TextModel._create_vocab_sentencepiece = create_vocab_sentencepiece
    TextModel.get_vocab_base_pre = lambda self, tokenizer: name
    sys.argv = ["convert_hf_to_gguf.py", folder, *own]
    runpy.run_path(str(Path(llama_cpp) / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    _main()
