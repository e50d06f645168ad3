"""Checkpoints of real training jobs, in a parallel layout, are read whole, and exported as any other."""

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_periln.checkpoints import reader
from megatron_periln.checkpoints.reader import Checkpoint
from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.errors import UsageError
from tests.parallel.jobs import load_tensors

MODEL = """--num-layers 4 --group-query-attention --num-query-groups 2 --kv-channels 24 --swiglu
    --normalization RMSNorm --disable-bias-linear --add-qkv-bias --position-embedding-type rope
    --norm-placement peri --train-iters 3 --save-interval 3"""
LAYOUT = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"


@pytest.fixture(scope="module")
def trained(jobs):
    return jobs.run("tensor-and-pipeline-parallel", f"{MODEL} {LAYOUT}", ranks=4).folder / "checkpoints"


def test_tensors_are_read_whole(trained, single_process):
    checkpoint = Checkpoint(trained)
    for name, whole in load_tensors(trained / "iter_0000003").items():
        if name.startswith("decoder.layers."):
            for layer in range(4):
                tensor = checkpoint.read(name.removeprefix("decoder.layers."), layer)
                assert torch.equal(tensor, whole[layer]), name
        elif not name.startswith("optimizer"):
            assert torch.equal(checkpoint.read(name), whole), name


def test_each_part_is_looked_at_once(trained, single_process, monkeypatch):
    """torch looks through all that a tensor was saved in; of a layer that is those of all layers."""
    looked_at = []

    def looking(key, entry, regions):
        looked_at.append(len(entry.chunks))
        return create_read_items_for_chunk_list(key, entry, regions)

    monkeypatch.setattr(reader, "create_read_items_for_chunk_list", looking)
    checkpoint = Checkpoint(trained)
    for layer in range(4):
        checkpoint.read("mlp.linear_fc1.weight", layer)
    parts = checkpoint._tensors["decoder.layers.mlp.linear_fc1.weight"].chunks
    assert sum(looked_at) == len(parts) >= 8


def test_export_of_tensor_and_pipeline_parallel_checkpoint(trained, single_process, tmp_path):
    said = []
    export(trained, tmp_path / "model", ExportOptions(), say=said.append)
    assert said[0].startswith("Target glm4")
    (parity,) = [line for line in said if line.startswith("Parity check")]
    assert float(parity.split("fp32: ")[1].split()[0]) <= 1e-5
    assert "the checkpoint was trained with NullTokenizer; --tokenizer PATH adds them" in said[1]
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (256, 64)
    assert tensors["model.layers.3.self_attn.k_proj.bias"].shape == (48,)


def test_a_tensor_that_is_not_there_is_named(trained, single_process):
    with pytest.raises(UsageError, match=r"has no tensor decoder\.layers\.2\.self_attention\.q_layernorm"):
        Checkpoint(trained).read("self_attention.q_layernorm.weight", 2)
