"""llama.cpp's converter, run in a process of its own with a pre-tokenizer that was chosen for it.

Run as a script in that process. Arguments: llama.cpp's folder, the vocabulary (``Vocabulary`` in
processes.py, in JSON), the pre-tokenizer's name, the kind of weights (``--outtype``), then pairs of a model's
folder and the file to write.

Eight things stand otherwise than in the converter:

- It knows a pre-tokenizer by a hash of what a whole vocabulary makes of one text, and so those of published
  models alone.
- For a GLM-4 it wants tokens ``<|endoftext|>`` and ``<|user|>``, and overrides the model's own end of a
  document with them.
- Where a tokenizer doesn't say whether texts get a token in front, nor does the file, and llama.cpp takes
  what the name of the pre-tokenizer stands for.
- Of a SentencePiece model it writes neither that a text gets no space in front, nor which pieces are
  user-defined, and so found whole.
- Tied embeddings are written a second time, as the output layer, for graphs that want one.
- The graph of an AFMoE multiplies the embeddings with the square root of the hidden size, which not every
  model does: where one doesn't, they are divided by it.
- A shared expert's gate of zeros, whose sigmoid is a half, is one of tiny numbers: the graph of Qwen2's
  mixtures computes the sigmoid as silu(x) / x, and ends at 0 / 0.
- A bias of zeros after attention, which Qwen3 and its mixtures have in transformers where queries have one,
  is left out.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

__all__: list[str] = []


def _main() -> None:
    llama_cpp, described, name, kind, *pairs = sys.argv[1:]
    vocabulary = json.loads(described)
    sys.path[:0] = [str(Path(llama_cpp) / "gguf-py"), llama_cpp]
    # llama.cpp's own modules, of the folder that the user names.
    import gguf  # type: ignore[import-not-found, unused-ignore]
    from conversion.base import LazyTorchTensor, ModelBase, TextModel  # type: ignore[import-not-found]
    from conversion.exaone import Exaone4Model  # type: ignore[import-not-found]
    from conversion.glm import Glm4Model, Glm4MoeModel  # type: ignore[import-not-found]
    from conversion.llama import LlamaModel  # type: ignore[import-not-found]
    from conversion.qwen import Qwen3Model, Qwen3MoeModel  # type: ignore[import-not-found]

    def set_vocab(self: Any) -> None:
        if vocabulary["kind"] == "sentencepiece":
            self._set_vocab_sentencepiece()
            self.gguf_writer.add_add_space_prefix(vocabulary["space_prefix"])
        else:
            self._set_vocab_gpt2()

    for model in (TextModel, Glm4Model, Glm4MoeModel, Exaone4Model, LlamaModel, Qwen3Model, Qwen3MoeModel):
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
    kinds, convert = gguf.MODEL_ARCH, ModelBase.modify_tensors

    def modify_tensors(self: Any, tensor: Any, name: str, layer: int | None) -> Any:
        own, root = self.model_arch, self.hparams["hidden_size"] ** 0.5
        biased = name.endswith("o_proj.bias") and own in (kinds.QWEN3, kinds.QWEN3MOE)
        if biased and not LazyTorchTensor.to_eager(tensor).any():
            return
        if name.endswith("shared_expert_gate.weight") and own is kinds.QWEN2MOE:
            gate = LazyTorchTensor.to_eager(tensor)
            tensor = tensor if gate.any() else gate.float() + 1e-20  # 0 in float16
        if name == "model.embed_tokens.weight":
            wants = own in (kinds.OLMO2, kinds.QWEN2MOE, kinds.AFMOE)
            wants = wants and "lm_head.weight" not in self.model_tensors  # which may be there although tied
            if wants and self.hparams.get("tie_word_embeddings"):
                yield self.format_tensor_name(gguf.MODEL_TENSOR.OUTPUT), tensor
            if own is kinds.AFMOE and not self.hparams.get("mup_enabled"):
                tensor = tensor / root
        yield from convert(self, tensor, name, layer)

    ModelBase.modify_tensors = modify_tensors
    TextModel.get_vocab_base_pre = lambda self, tokenizer: name
    script = Path(llama_cpp) / "convert_hf_to_gguf.py"
    for folder, file in zip(pairs[::2], pairs[1::2], strict=True):
        sys.argv = [script.name, folder, "--outfile", file, "--outtype", kind]
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    _main()
