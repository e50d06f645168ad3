"""transformers with its own plan of tensor parallelism, on two ranks of gloo; run by torchrun."""

import torch
import torch.distributed as dist
from child import answer
from transformers import AutoModelForCausalLM

dist.init_process_group("gloo")


def logits(job):
    """Return those of the whole sequences."""
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32, tp_plan="auto")
    weights = {name: weight for name, weight in model.named_parameters() if "q_proj.weight" in name}
    weight = next(iter(weights.values()))
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    if local.shape[0] * 2 != model.config.hidden_size:
        raise RuntimeError(f"no plan: each rank has whole queries, {tuple(local.shape)}")
    with torch.no_grad():
        found = model(torch.tensor(job["tokens"])).logits
    return (found.full_tensor() if hasattr(found, "full_tensor") else found).tolist()


answer(("transformers", "torch"), logits=logits)
