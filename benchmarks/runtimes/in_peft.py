"""PEFT: which modules it takes, and what its merged, sharded and resized models are, as folders."""

import torch
from child import answer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, ADDED = 3, 3


def load(job):
    """Load a model to train."""
    return AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)


def default_modules(job):
    """Return what PEFT takes when it is told nothing."""
    model = get_peft_model(load(job), LoraConfig(task_type="CAUSAL_LM"))
    return sorted(next(iter(model.peft_config.values())).target_modules)


def lora(job):
    """Train on all linear layers, merge, save, load again: return how far the logits moved, and are apart."""
    torch.manual_seed(0)
    tokens = torch.tensor(job["tokens"])
    base = load(job)
    with torch.no_grad():
        before = base(tokens).logits
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(STEPS):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        trained = model(tokens).logits
    names = sorted({n.split(".")[-1] for n, m in model.named_modules() if hasattr(m, "lora_A")})
    merged = model.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    work = job["work"]
    for part in ("merged", "sharded", "resized"):
        tokenizer.save_pretrained(f"{work}/{part}")
    merged.save_pretrained(f"{work}/merged")
    again = AutoModelForCausalLM.from_pretrained(f"{work}/merged", dtype=torch.float32)
    with torch.no_grad():
        apart = (again(tokens).logits - trained).abs().max().item()
    again.to(torch.bfloat16).save_pretrained(f"{work}/sharded", max_shard_size="500KB")
    merged.resize_token_embeddings(merged.config.vocab_size + ADDED)
    merged.save_pretrained(f"{work}/resized")
    return {"moved": (trained - before).abs().max().item(), "apart": apart, "modules": names}


answer(("peft", "transformers", "torch"), default_modules=default_modules, lora=lora)
