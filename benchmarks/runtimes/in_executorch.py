"""ExecuTorch with XNNPACK, and the tokenizer of its runtime in C++."""

import torch
from child import answer
from plain import Plain

LENGTH = 16


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
