#!/usr/bin/env bash
# transformers 5: AutoTokenizer.from_pretrained(name, vocab_file=..., merges_file=...) builds the tokenizer of `name` and
# passes the two files over without a word, as soon as `name` has a tokenizer.json of its own; the arguments are accepted.
# Megatron-core 0.19 calls it so for --vocab-file and --merge-file, with `gpt2` for a name.
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
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer


def train(folder, text, size):
    folder = Path(folder)
    folder.mkdir()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save_model(str(folder))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


text = "the files that were given are not the files that are read"
train("named", "another text altogether, of other words", 270)
train("given", text * 9, 300)
files = {"vocab_file": "given/vocab.json", "merges_file": "given/merges.txt"}
found = AutoTokenizer.from_pretrained("named", **files)
named = AutoTokenizer.from_pretrained("named")
given = ByteLevelBPETokenizer(files["vocab_file"], files["merges_file"])
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
print("vocabulary: named", len(named), "given", given.get_vocab_size(), "found", len(found))
print("ids of the given files:", given.encode(text).ids)
print("ids that are found:    ", found(text).input_ids)
assert found(text).input_ids == named(text).input_ids != given.encode(text).ids, "the behaviour changed"
Path("named/tokenizer.json").unlink()
found = AutoTokenizer.from_pretrained("named", **files)
print("without tokenizer.json in the folder:", "the given files" if found(text).input_ids == given.encode(text).ids
      else "the folder's own, again")
PYTHON
