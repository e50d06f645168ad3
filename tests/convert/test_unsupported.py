"""Which target is chosen, and what is refused."""

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_periln.convert.architecture import Architecture, Rope
from megatron_periln.convert.experts.architecture import Experts
from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.layer_kinds import LayerKinds
from megatron_periln.convert.targets import TARGETS
from megatron_periln.convert.unsupported import (
    choose_target,
    refuse_unsupported,
    unsupported_by,
    unsupported_by_all,
)
from megatron_periln.errors import UsageError
from megatron_periln.norms import NormPlacement
from tests.convert import checkpoints
from tests.convert.cases import CASES

UNKNOWN_TO_0_18 = (
    "dataloader_inter_document_masking",
    "freeze_all_layers",
    "moe_shared_expert_glu_interleave_size",
    "mtp_detach_heads",
    "tensor_parallel_num_weight_shards",
    "yarn_beta_fast",
    "yarn_original_max_position_embeddings",
)

PERI = Architecture(
    placement=NormPlacement.named("peri"),
    eps=1e-5,
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=100,
    max_positions=64,
    rope=Rope(theta=10000),
)

WINDOWS = LayerKinds(windowed=(True, False), rotated=(True, False), window=8)


@pytest.mark.parametrize(
    "changes, target",
    [
        ({}, "glm4"),
        ({"biases": frozenset({"qkv", "proj", "mlp"})}, "hyperclovax"),
        ({"qk_norm": True}, "lfm3"),
        ({"placement": NormPlacement.named("pre")}, "llama"),
        ({"placement": NormPlacement.named("pre"), "qk_norm": True, "num_heads": 6}, "qwen3"),
        ({"placement": NormPlacement.named("output"), "qk_norm": True}, "exaone4"),
        ({"placement": NormPlacement.named("post").with_options(embedding=True)}, "minimax"),
        ({"placement": NormPlacement.named("output"), "qk_norm": True, "kinds": WINDOWS}, "exaone4"),
        ({"placement": NormPlacement.named("output"), "qk_norm": True, "whole_qk_norm": True}, "olmo2"),
    ],
)
def test_the_first_target_that_computes_the_same_is_chosen(changes, target):
    architecture = replace(PERI, **changes)
    chosen, why = choose_target(architecture)
    assert chosen.name == target
    assert why.startswith(f"it computes {architecture.placement.name}")
    assert unsupported_by(chosen, architecture) == []


@pytest.mark.parametrize(
    "target, changes, reason",
    [
        ("glm4", {"kinds": WINDOWS}, ["its attention has a window", "some of its layers have no positions"]),
        (
            "exaone4",
            {"kinds": replace(WINDOWS, rotated=(True, True))},
            ["exaone4 has positions in the layers with a window and in no others"],
        ),
        (
            "exaone4",
            {"kinds": replace(WINDOWS, windowed=(False, False), window=None)},
            ["exaone4 has positions in the layers with a window and in no others"],
        ),
        (
            "exaone4",
            {"kinds": LayerKinds(windowed=(False, False), rotated=(False, False))},
            ["its layers have no positions, and without windows all of exaone4's do"],
        ),
        ("olmo2", {"whole_qk_norm": False}, ["of each head, and olmo2's over all together"]),
        ("exaone4", {"whole_qk_norm": True}, ["over all heads together, and exaone4's of each"]),
        (
            "glm4",
            {"placement": PERI.placement.changed({"norms": {"input": {"epsilon": 0.1}}})},
            ["its input norm has an epsilon of 0.1, and glm4 has one for all norms, 1e-05"],
        ),
        ("glm4", {"attention_gate": True}, ["its attention is gated, and glm4's is not"]),
        (
            "afmoe",
            {"attention_gate": True, "biases": frozenset({"qkv"})},
            ["the gate", "it has biases (qkv)"],
        ),
    ],
)
def test_kinds_of_layers_that_a_target_lacks(target, changes, reason):
    placement = NormPlacement.named(TARGETS[target].placement)
    qk_norm = TARGETS[target].qk_norm
    experts = Experts(layers=(True, True), count=4, chosen=2, width=32, score="sigmoid", normalized=True)
    mixture = {"experts": experts} if TARGETS[target].mixture else {}
    architecture = replace(
        PERI, placement=placement, qk_norm=qk_norm, whole_qk_norm=TARGETS[target].whole_qk_norm, **mixture
    )
    assert unsupported_by(TARGETS[target], architecture) == []
    found = [each.reason for each in unsupported_by(TARGETS[target], replace(architecture, **changes))]
    assert len(found) == len(reason)
    assert all(part in each for part, each in zip(reason, found, strict=True))


def test_a_window_of_all_tokens_before_is_none():
    """As Megatron's attention and ours have it: -1 is infinite."""

    def kinds(*window):
        core = SimpleNamespace(
            num_layers=2, window_size=window, window_attn_skip_freq=None, no_rope_freq=None
        )
        return LayerKinds.of(core)

    assert kinds(-1, 0) == LayerKinds.all_plain(2) == kinds()
    assert kinds(0, 0).window == 1


def test_heads_that_do_not_divide_the_hidden_size_are_unsupported():
    architecture = replace(PERI, placement=NormPlacement.named("pre"), num_heads=6)
    with pytest.raises(UsageError, match="nearest is llama: its hidden size is not divisible"):
        choose_target(architecture)


@pytest.mark.parametrize("name", TARGETS)
def test_every_parameter_of_a_layer_has_a_name(name):
    target = TARGETS[name]
    names = {target.tensor_name(f"{module}.weight", 1, 3) for module in target.names if "last." not in module}
    assert len(names) == len(target.names) - ("last.mlp.output_norm" in target.names)


@pytest.mark.parametrize(
    "args, reason",
    [
        ({"hybrid_layer_pattern": "*-*-"}, "it is a hybrid model"),
        ({"multi_latent_attention": True}, "it has multi-latent attention"),
        ({"qk_l2_norm": True}, "its queries and keys have L2 norms"),
        ({"position_embedding_type": "mrope"}, "its positions are not rotary"),
        (
            {"position_embedding_type": "yarn", "mscale": 0.7, "mscale_all_dim": 0.0},
            "its YaRN has --mscale or --mscale-all-dim",
        ),
        (
            {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 4},
            "its rotary frequencies are scaled twice",
        ),
        ({"activation_func_clamp_value": 0.1, "bias_swiglu_fusion": False}, "its MLP is clamped"),
    ],
)
def test_what_no_target_has_is_unsupported(args, reason):
    saved = Namespace(**args)
    assert [feature.reason for feature in unsupported_by_all(saved)] == [reason]
    with pytest.raises(UsageError, match=f"no target can express this model: {reason}"):
        refuse_unsupported(saved)


def test_what_megatron_does_not_read_is_not_unsupported(single_process, tmp_path):
    """The fused SwiGLU does not clamp, and nothing starts the residual stream after the norm."""
    unread = " --activation-func-clamp-value 0.1 --apply-residual-connection-post-layernorm"
    saved = checkpoints.save(tmp_path / "checkpoint", CASES["peri"].flags + unread)
    said = []
    export(saved.folder, tmp_path / "model", ExportOptions(), say=said.append)
    (parity,) = [line for line in said if line.startswith("Parity check")]
    assert float(parity.split("fp32: ")[1].split()[0]) <= 1e-5


def test_checkpoints_of_megatron_core_0_18_are_exported(single_process, tmp_path):
    """What it did not know is at its default."""
    saved = checkpoints.save(tmp_path / "checkpoint", CASES["peri"].flags)
    path = saved.folder / "iter_0000007"
    state = dist_checkpointing.load_common_state_dict(str(path))
    for name in UNKNOWN_TO_0_18:
        delattr(state["args"], name)
    torch.save(state, path / "common.pt")  # where 0.18 has it
    said = []
    export(saved.folder, tmp_path / "model", ExportOptions(), say=said.append)
    (parity,) = [line for line in said if line.startswith("Parity check")]
    assert float(parity.split("fp32: ")[1].split()[0]) <= 1e-5


def test_layers_of_multi_token_prediction_are_left_out_with_a_word(single_process, tmp_path):
    saved = checkpoints.save(tmp_path / "checkpoint", CASES["peri"].flags + " --mtp-num-layers 1")
    said = []
    export(saved.folder, tmp_path / "model", ExportOptions(verify=False), say=said.append)
    assert said[1] == "The layers of multi-token prediction are left out: the target has none"
