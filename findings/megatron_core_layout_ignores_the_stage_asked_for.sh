#!/usr/bin/env bash
# megatron-core 0.19.2: get_num_layers_to_build and get_transformer_layer_offset take the pipeline stage as pp_rank. With
# --pipeline-model-parallel-layout they pass over it and answer for the stage of the process that asks, without a word: a
# tool that asks for every stage, as a planner or a converter does, is told of its own each time. Without a layout, and by the
# layout's own methods of these names, they answer for the stage asked for. Upstream's main of August 2026 has it too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.11.0 megatron-core==0.19.2
"$folder/env/bin/python" -W ignore - <<'PYTHON' 2>"$folder/error.log" || { cat "$folder/error.log"; exit 1; }
from importlib.metadata import version

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

print("megatron-core", version("megatron-core"))
parallel_state.set_pipeline_model_parallel_rank(0)  # this process is of the first stage


def stages(**split):
    """Return offset and number of layers of both stages, as asked of this process."""
    config = TransformerConfig(
        num_layers=6,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        **split,
    )
    asked = [
        (get_transformer_layer_offset(config, pp_rank=stage), get_num_layers_to_build(config, pp_rank=stage))
        for stage in (0, 1)
    ]
    layout = config.pipeline_model_parallel_layout
    own = layout and [
        (layout.get_layer_offset(pp_rank=stage), layout.get_num_layers_to_build(pp_rank=stage)) for stage in (0, 1)
    ]
    return asked, own


first_of_two, _ = stages(num_layers_in_first_pipeline_stage=2)
laid_out, by_the_layout = stages(pipeline_model_parallel_layout="Ett|ttttL")
print("2 + 4 layers, offset and number by stage")
print("  --decoder-first-pipeline-num-layers 2:         ", first_of_two)
print("  --pipeline-model-parallel-layout 'Ett|ttttL':  ", laid_out)
print("  the layout's own methods:                      ", by_the_layout)
right, repeated = [(0, 2), (2, 4)], [(0, 2), (0, 2)]
if (first_of_two, laid_out, by_the_layout) != (right, repeated, right):
    raise SystemExit("the behaviour changed")
PYTHON
