"""ExecuTorch with XNNPACK, and the tokenizer of its runtime in C++."""

import torch
from child import answer
from transformers import AutoModelForCausalLM

LENGTH = 16


class Plain(torch.nn.Module):
    """A model from tokens to logits."""

    def __init__(self, folder):
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self.model = model.eval()

    def forward(self, tokens):
        """Return the logits of tokens."""
        return self.model(tokens, use_cache=False).logits


def logits(job):
    """Return those of the first tokens of one sequence: the program is made for that shape."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    tokens = torch.tensor(job["tokens"])[:1, :LENGTH]
    with torch.no_grad():
        exported = torch.export.export(Plain(job["folder"]), (tokens,))
        program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    method = Runtime.get().load_program(program.buffer).load_method("forward")
    return method.execute([tokens])[0].tolist()


def ids(job):
    """Return those of pytorch-tokenizers."""
    from pytorch_tokenizers import CppHFTokenizer

    tokenizer = CppHFTokenizer()
    tokenizer.load(job["folder"])
    return [list(tokenizer.encode(text, 0, 0)) for text in job["texts"]]


answer(("executorch", "pytorch-tokenizers", "torch", "transformers"), logits=logits, ids=ids)
