#!/usr/bin/env bash
# transformers 5: the same tokenizer.json and tokenizer_config.json give other ids beside another config.json. For some
# values of `model_type` AutoTokenizer takes tokenizer.json as it is, for others, and without config.json, it keeps the
# vocabulary and rebuilds the rest by the class that tokenizer_config.json names. transformers 4 always takes tokenizer.json.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\P{N}+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
tokenizer.train_from_iterator([str(number * 7919) for number in range(2000)], trainer)
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
ids = {}
for name in ("glm4", "granite", "llama", "qwen3", None):
    folder = Path(name or "no config.json")
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    if name:
        (folder / "config.json").write_text(json.dumps({"model_type": name}))
    ids[name] = AutoTokenizer.from_pretrained(folder)("1234567890").input_ids
    print(f"{folder.name:>15}: {ids[name]}")
file = tokenizer.encode("1234567890").ids
print(f" tokenizer.json: {file}")
assert ids["glm4"] == ids["granite"] == file, "the behaviour changed"
assert ids["llama"] == ids["qwen3"] == ids[None] != file, "the behaviour changed"
PYTHON
