"""mergekit: an export and a copy with other weights, half of each."""

import subprocess
import sys
from pathlib import Path

import torch
from child import answer
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder):
    """Load a model."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(job):
    """Merge by mergekit; return logits of the model halfway, if the merge has its weights."""
    work = job["work"]
    torch.manual_seed(0)
    left, right = load(job["folder"]), load(job["folder"])
    with torch.no_grad():
        for weight in right.parameters():
            weight.mul_(1 + 0.1 * torch.randn_like(weight))
    right.save_pretrained(f"{work}/right")
    AutoTokenizer.from_pretrained(job["folder"]).save_pretrained(f"{work}/right")
    models = "".join(
        f"  - model: {each}\n    parameters: {{weight: 0.5}}\n" for each in (job["folder"], f"{work}/right")
    )
    Path(work, "merge.yaml").write_text(f"models:\n{models}merge_method: linear\ndtype: float32\n")
    command = [sys.executable.replace("/python", "/mergekit-yaml"), f"{work}/merge.yaml", f"{work}/merged"]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or ["no word"])[-1])
    tokens = torch.tensor(job["tokens"])
    with torch.no_grad():
        for mine, theirs in zip(left.parameters(), right.parameters(), strict=True):
            mine.copy_((mine + theirs) / 2)
        expected, merged = left(tokens).logits, load(f"{work}/merged")(tokens).logits
    return {"apart": (expected - merged).abs().max().item()}


answer(("mergekit", "transformers", "torch"), merge=logits)
