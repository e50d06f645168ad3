"""An exported model as torch.export takes one: from tokens to logits."""

import torch
from transformers import AutoModelForCausalLM


class Plain(torch.nn.Module):
    """A model from tokens to logits."""

    def __init__(self, folder):
        super().__init__()
        # The default way to compute experts, "grouped_mm", counts tokens in a histogram, which ONNX has for
        # two experts or more and ExecuTorch has not.
        ways = {"attn_implementation": "sdpa", "experts_implementation": "batched_mm"}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **ways)
        self.model = model.eval()

    def forward(self, tokens):
        """Return the logits of tokens."""
        return self.model(tokens, use_cache=False).logits
