#!/usr/bin/env bash
# megatron-core 0.19: GPTDataset deals samples in an order that depends on how many are asked for. Within one epoch a
# longer dataset begins with the same samples; across the end of an epoch hardly one stays in its place. A run that is
# resumed with more --train-iters goes on by its number of consumed samples in another order: it meets samples again
# that it has trained on, and never meets others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.11.0 megatron-core==0.19.2
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON' 2>error.log || { cat error.log; exit 1; }
from importlib.metadata import version

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer

draw = np.random.default_rng(0)
builder = IndexedDatasetBuilder("corpus.bin", dtype=np.uint16)
for _ in range(400):
    tokens = draw.integers(0, 255, draw.integers(1, 60))
    builder.add_document(tokens, [len(tokens)])
builder.finalize("corpus.idx")


def samples(number):
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        blend=(["corpus"], None),
        split="100,0,0",
        path_to_cache="cache",
        tokenizer=MegatronTokenizer.from_pretrained(
            metadata_path={"library": "null-text"}, vocab_size=255, eod_id=255
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    dataset, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [number, 0, 0], lambda: True, config).build()
    return [dataset[n]["tokens"].tolist() for n in range(number)]


epoch = 12_000 // 16  # tokens of the corpus, about, by those of a sample
short, longer, across = samples(epoch // 2), samples(epoch * 8 // 10), samples(epoch * 19 // 10)
same = lambda one, other: sum(a == b for a, b in zip(one, other))
print("megatron-core", version("megatron-core"))
print(f"{len(short)} samples, and {len(longer)} of the same epoch: {same(short, longer)} in their places")
print(f"{len(longer)} samples, and {len(across)}, of two epochs: {same(longer, across)} in their places")
again = sum(sample in across[len(longer) :] for sample in longer)
print(f"resumed after {len(longer)} of {len(across)}: {again} of those are met again among what is left")
assert same(short, longer) == len(short), "the behaviour changed"
assert same(longer, across) < len(longer) // 10, "the behaviour changed"
PYTHON
