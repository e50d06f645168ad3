"""Mixtures of experts: exports from parallel layouts, what a mistake in them does, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_periln.checkpoints.reader import NORM_BEFORE_EXPERTS, Checkpoint
from megatron_periln.convert.experts.architecture import Experts, sparse_layers
from megatron_periln.convert.experts.unsupported import unsupported_by_all_mixtures, unsupported_experts
from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.import_model import ImportOptions, import_model
from megatron_periln.convert.parity_check import TOLERANCE, compare_logits
from megatron_periln.convert.targets import TARGETS
from megatron_periln.errors import UsageError
from tests.convert import checkpoints
from tests.convert.cases import CASES
from tests.convert.published import SIZES, make, quietly

SIGMOID = "pre, experts by sigmoid"
MODEL = """--num-layers 4 --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --norm-placement pre --qk-layernorm
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-layer-freq [0,1,1,1]
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-load-balancing-type none
    --moe-shared-expert-intermediate-size 64 --moe-token-dispatcher-type alltoall
    --train-iters 2 --save-interval 2 --eval-iters 0"""
LAYOUT = """--expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --tensor-model-parallel-size 2
    --sequence-parallel"""
EXPERTS = Experts(layers=(False, True, True), count=6, chosen=2, width=48, score="softmax", normalized=True)


def parity(said):
    (line,) = [line for line in said if line.startswith("Parity check")]
    return float(line.split("fp32: ")[1].split()[0])


def test_export_of_an_expert_parallel_checkpoint(jobs, single_process, tmp_path):
    """Whose router's bias has moved."""
    folder = jobs.run("expert-parallel-export", f"{MODEL} {LAYOUT}", ranks=2).folder / "checkpoints"
    said = []
    export(folder, tmp_path / "model", ExportOptions(), say=said.append)
    assert said[0].startswith("Target glm4_moe")
    assert parity(said) <= 1e-5
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    weights = [tensors[f"model.layers.2.mlp.experts.{expert}.up_proj.weight"] for expert in range(4)]
    assert all(weight.shape == (64, 64) and weight.std() > 0.01 for weight in weights)
    assert len({weight.sum().item() for weight in weights}) == 4
    assert tensors["model.layers.2.mlp.gate.e_score_correction_bias"].any()
    assert not any("experts" in name for name in tensors if ".layers.0." in name)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rotated_experts(tensors):
    """Each expert with the weights of the next."""
    return {
        name.replace(f"experts.{n}.", f"experts.{(n + 1) % 6}.")
        if (n := expert_of(name)) is not None
        else name: t
        for name, t in tensors.items()
    }


def expert_of(name):
    parts = name.split(".experts.")
    return int(parts[1].split(".")[0]) if len(parts) > 1 else None


def swapped_gate_and_up(tensors):
    exchange = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return {
        ".".join(
            exchange.get(part, part) if ".experts." in name else part for part in name.split(".")
        ): tensor
        for name, tensor in tensors.items()
    }


def without_bias(tensors):
    return {name: tensor * ("correction" not in name) for name, tensor in tensors.items()}


def without_shared_experts(tensors):
    return {name: tensor * ("shared_experts.down" not in name) for name, tensor in tensors.items()}


MISTAKES = {
    "experts": (rotated_experts, {}),
    "gate and up": (swapped_gate_and_up, {}),
    "bias": (without_bias, {}),
    "shared": (without_shared_experts, {}),
    "chosen": (dict, {"num_experts_per_tok": 3}),
    "sum": (dict, {"norm_topk_prob": False}),
    "scale": (dict, {"routed_scaling_factor": 1.0}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_logits_tell_a_mistake(saved, exported, tmp_path, mistake):
    """The negative controls of the parity check."""
    change, settings = MISTAKES[mistake]
    folder = shutil.copytree(exported(SIGMOID)[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = checkpoints.sample()
    with torch.no_grad():
        found = compare_logits(load(folder)(tokens).logits, saved(SIGMOID).logits(tokens))
    assert found.maximum > 100 * TOLERANCE


def test_checkpoints_of_transformer_engine_are_exported(single_process, tmp_path):
    """Where the norm before experts has another name, and our own have both."""
    saved = checkpoints.save(tmp_path / "checkpoint", CASES[SIGMOID].flags)
    path = saved.folder / "iter_0000007"
    state = saved.model.sharded_state_dict()
    for name, sharded in state.items():
        if "pre_mlp_layernorm" in name and not name.startswith("decoder.layers.0."):
            sharded.key = sharded.key.replace(*NORM_BEFORE_EXPERTS)
    common = dist_checkpointing.load_common_state_dict(str(path))
    shutil.rmtree(path)
    path.mkdir()
    dist_checkpointing.save({**common, "model": state}, str(path), async_strategy="mcore")
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in dist_checkpointing.load_tensors_metadata(str(path))
    said = []
    export(saved.folder, tmp_path / "model", ExportOptions(), say=said.append)
    assert parity(said) <= 1e-5


def test_a_mixture_is_exported_without_the_fixes_of_training(saved, monkeypatch, tmp_path):
    """Tools apply none of them; the negative control is Megatron's own reading of a checkpoint's names."""
    fixed = TorchDistLoadShardedStrategy.load_tensors_metadata
    monkeypatch.setattr(TorchDistLoadShardedStrategy, "load_tensors_metadata", fixed.__wrapped__)
    checkpoint = saved(SIGMOID)
    with pytest.raises(TypeError, match="strides"):
        dist_checkpointing.load_tensors_metadata(str(checkpoint.folder / "iter_0000007"))
    said = []
    export(checkpoint.folder, tmp_path / "model", ExportOptions(), say=said.append)
    assert parity(said) <= 1e-5


def test_an_import_serves_both_implementations_in_bf16_too(single_process, tmp_path):
    """The router's bias stays in fp32, in which training has it."""
    make(tmp_path / "source", "glm4_moe", torch.bfloat16)
    import_model(tmp_path / "source", tmp_path / "checkpoint", ImportOptions(verify=False), say=quietly)
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    there = dist_checkpointing.load_tensors_metadata(str(checkpoint.path))
    local, engine = (f"decoder.layers.1.{name}weight" for name in NORM_BEFORE_EXPERTS)
    assert local in there and engine in there
    assert "decoder.layers.0.pre_mlp_layernorm.weight" not in there
    bias = checkpoint.read("mlp.router.expert_bias", 1)
    assert bias.dtype is torch.float32 and bias.any()
    assert checkpoint.read("mlp.router.weight", 1).dtype is torch.bfloat16
    source = load_file(tmp_path / "source" / "model.safetensors")
    up = checkpoint.read("mlp.experts.experts.linear_fc1.weight", 2, 3)[48:]
    assert torch.equal(up, source["model.layers.2.mlp.experts.3.up_proj.weight"])


@pytest.mark.parametrize(
    "target, changes, reason",
    [
        ("llama", {}, "it has experts, and llama has none"),
        ("mixtral", {}, "some of its layers are dense, and mixtral has experts in all"),
        ("glm4_moe", {"score": "sigmoid", "layers": (True, False, True)}, "dense layers stand between"),
        ("qwen3_moe", {"score": "sigmoid"}, "scores are sigmoid and qwen3_moe's are softmax"),
        ("mixtral", {"layers": (True,) * 3, "normalized": False}, "scores do not add up to 1"),
        ("qwen3_moe", {"bias": True}, "its router has a bias of experts"),
        ("qwen3_moe", {"groups": (3, 1)}, "its router chooses groups of experts, and qwen3_moe's does not"),
        (
            "glm4_moe",
            {"score": "sigmoid", "groups": (3, 2)},
            "by the best 1 of each, and glm4_moe's by the best 2",
        ),
        ("qwen3_moe", {"shared_width": 48}, "it has a shared expert, and qwen3_moe has none"),
        ("glm4_moe", {"score": "sigmoid", "shared_width": 60}, "not a multiple of 48 wide"),
        (
            "glm4_moe",
            {"score": "sigmoid", "shared_width": 48, "shared_switch": True},
            "its shared expert has a gate, and glm4_moe's has none",
        ),
    ],
)
def test_what_a_target_lacks_is_said(target, changes, reason):
    ((found, change),) = unsupported_experts(TARGETS[target], replace(EXPERTS, **changes))
    assert reason in found
    assert change


def test_a_dense_model_is_none_of_a_mixture():
    assert list(unsupported_experts(TARGETS["mixtral"], None)) == [
        ("it has no experts, and mixtral has", "--num-experts")
    ]
    assert list(unsupported_experts(TARGETS["llama"], None)) == []


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"add_bias_linear": True}, "its experts have biases"),
        ({"moe_latent_size": 32}, "its experts work in a latent space"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "its router is balanced by sinkhorn"),
        ({"moe_router_load_balancing_type": ["aux_loss", "quantile_balancing"]}, "balanced by quantile"),
    ],
)
def test_what_no_target_has_is_said(changes, reason):
    from argparse import Namespace

    dense = {"add_bias_linear": False}
    ((found, _),) = unsupported_by_all_mixtures(Namespace(**{"num_experts": 4, **dense, **changes}))
    assert reason in found
    assert list(unsupported_by_all_mixtures(Namespace(**{"num_experts": None, **changes}))) == []


@pytest.mark.parametrize(
    "frequency, layers",
    [(1, (True,) * 4), (2, (True, False, True, False)), ([0, 1, 1, 0], (False, True, True, False))],
)
def test_layers_with_experts(frequency, layers):
    assert sparse_layers(frequency, 4) == layers


SETTINGS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}


@pytest.mark.parametrize(
    "name, changes, message",
    [
        (
            "qwen3_moe",
            {"num_experts_per_tok": 1, "norm_topk_prob": True},
            "norm_topk_prob True, and num_experts_per_tok 1",
        ),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok 0, which must be a whole number"),
        (
            "qwen3_moe",
            {"moe_intermediate_size": -1},
            "moe_intermediate_size -1, which must be a whole number",
        ),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts 0, which must be a whole number"),
        ("qwen3_moe", {"num_experts_per_tok": 129}, "num_experts_per_tok 129, and num_experts 128"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "none of the model's layers has experts"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "has decoder_sparse_step 2"),
        (
            "glm4_moe",
            {"norm_topk_prob": False},
            "norm_topk_prob False, and num_experts_per_tok 2",
        ),
        ("glm4_moe", {"n_group": 4, "topk_group": 2}, "the model has topk_group 2 for 2 experts a token"),
    ],
)
def test_what_megatron_has_nothing_for_is_refused(tmp_path, name, changes, message):
    config = transformers.AutoConfig.for_model(
        name, **SIZES, **{**SETTINGS, "num_nextn_predict_layers": 0, **changes}
    )
    config.save_pretrained(tmp_path / "source")
    with pytest.raises(UsageError, match=message):
        import_model(tmp_path / "source", tmp_path / "checkpoint", ImportOptions(), say=quietly)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"num_experts": 5},
            r"has num_experts 5, and its tensors 6: .* has model\.layers\.0\.mlp\.gate\.weight",
        ),
        ({"moe_intermediate_size": 40}, r"has moe_intermediate_size 40, and its tensors 48:"),
        ({"mlp_only_layers": [1]}, r"has no tensor model\.layers\.1\.mlp\.gate_proj\.weight"),
    ],
)
def test_tensors_that_config_json_does_not_promise(tmp_path, settings, message):
    source = make(tmp_path / "source", "qwen3_moe")
    config = json.loads((source / "config.json").read_text())
    config.pop("num_local_experts")
    (source / "config.json").write_text(json.dumps({"num_experts": 6, **config, **settings}))
    with pytest.raises(UsageError, match=message):
        import_model(source, tmp_path / "checkpoint", ImportOptions(), say=quietly)
