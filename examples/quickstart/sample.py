"""Let transformers continue some text with an exported model: ``sample.py MODEL OUTPUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

START = "class Test("


def main(model: str, output: str) -> None:
    """Write what the model in a folder makes of ``START`` into a file."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    tokens = tokenizer(START, return_tensors="pt", add_special_tokens=False)
    found = network.generate(**tokens, max_new_tokens=64, do_sample=True, top_k=50, temperature=0.9)
    lines = [line.strip() for line in tokenizer.decode(found[0]).splitlines() if line.strip()]
    Path(output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
