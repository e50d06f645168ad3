"""An exported model as torch.export takes one: from tokens to logits."""

import torch
from transformers import AutoModelForCausalLM


class Plain(torch.nn.Module):
    """A model from tokens to logits."""

    def __init__(self, folder):
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self.model = model.eval()

    def forward(self, tokens):
        """Return the logits of tokens."""
        return self.model(tokens, use_cache=False).logits
