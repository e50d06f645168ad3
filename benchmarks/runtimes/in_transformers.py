"""transformers."""

import torch
from child import answer, auto_tokenizer_ids
from transformers import AutoModelForCausalLM


def logits(job):
    """Return those of the whole sequences."""
    model = AutoModelForCausalLM.from_pretrained(job["folder"], torch_dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(job["tokens"])).logits.tolist()


answer(("transformers", "tokenizers", "torch"), logits=logits, ids=auto_tokenizer_ids)
