#!/usr/bin/env bash
# mergekit 0.1.5: a mixture with one expert in each layer, of an architecture that mergekit has no list of tensors for, is
# merged without its experts: it exits with 0, and none of its output names them. There it takes the names from
# transformers, where the experts of a layer are one tensor, and counts that tensor as optional unless files have experts
# of at least two numbers (`_has_complete_wildcard_group` in mergekit/architecture/conversion.py); an optional tensor that
# no file has by its own name is skipped, told at the level of information only. transformers then fills the experts with
# new random values. With two experts, and with the one saved under transformers' own names, the merge has all weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q mergekit==0.1.5 transformers==5.24.0 torch==2.15.0
cd "$folder"
PATH="$folder/env/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$folder/env/bin/python" - <<'PYTHON'
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MiniMaxConfig, MiniMaxForCausalLM

print(*(f"{name} {version(name)}" for name in ("mergekit", "transformers", "torch")))
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["full_attention"] * 2}
tokens = torch.arange(16)[None]


@torch.no_grad()
def logits(folder):
    model, about = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model(tokens).logits, sorted(about["missing_keys"])


def merged(name, experts, **save):
    """Merge one model alone, which is to give the same model; return how far the logits are apart, and what is missing."""
    folder = Path(name).absolute()
    torch.manual_seed(0)
    config = MiniMaxConfig(**sizes, num_local_experts=experts, num_experts_per_tok=1, initializer_range=0.5)
    model = MiniMaxForCausalLM(config).eval()
    model.save_pretrained(folder / "model", **save)
    (folder / "merge.yaml").write_text(
        f"models:\n  - model: {folder}/model\nmerge_method: passthrough\ndtype: float32\n"
    )
    command = ["mergekit-yaml", folder / "merge.yaml", folder / "merged", "--no-copy-tokenizer"]
    ended = subprocess.run(command, capture_output=True, text=True)
    told = (ended.stdout + ended.stderr).replace(str(folder), "")
    with torch.no_grad():
        right = model(tokens).logits
    read, none = logits(folder / "model")
    assert torch.equal(read, right) and not none, "transformers reads the model that it saved"
    found, missing = logits(folder / "merged")
    apart = (found - right).abs().max().item()
    print(f"{name}: exit {ended.returncode}, experts in its output: {'expert' in told.lower()}, logits apart {apart:.2g},")
    print(f"    missing: {', '.join(missing) or 'nothing'}")
    return ended.returncode, "expert" in told.lower(), apart > 0.1, len(missing)


one = merged("one", 1)
two = merged("two", 2)
other = merged("one, by transformers' names", 1, save_original_format=False)
assert two == other == (0, False, False, 0), "the behaviour changed: also with other models"
assert one == (0, False, True, 4), "the behaviour changed"
PYTHON
