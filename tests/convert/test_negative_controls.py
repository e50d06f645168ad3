"""The parity check fails for each mistake that an export could make, and nothing is left."""

import pytest

from megatron_periln.convert import export as exporting
from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.parity_check import TOLERANCE, sample_tokens
from megatron_periln.convert.weights import separate_rotary_pairs
from megatron_periln.errors import UsageError
from tests.convert import checkpoints


def unpermuted(architecture, tensors):
    """Rotary pairs where Megatron has them."""
    return {
        name: separate_rotary_pairs(tensor, architecture) if "q_proj" in name or "k_proj" in name else tensor
        for name, tensor in tensors.items()
    }


def swapped_gate_and_up(_, tensors):
    return {
        name: tensor.roll(len(tensor) // 2, 0) if "gate_up_proj" in name else tensor
        for name, tensor in tensors.items()
    }


def swapped_norm_weights(_, tensors):
    """The output norm of attention and the input norm of the MLP exchanged."""
    one, other = "post_self_attn_layernorm", "post_attention_layernorm"

    def name_of(name):
        return name.replace(one, "*").replace(other, one).replace("*", other)

    return {name_of(name): tensor for name, tensor in tensors.items()}


def swapped_query_heads(architecture, tensors):
    return {
        name: tensor.roll(architecture.head_dim, 0) if "q_proj" in name else tensor
        for name, tensor in tensors.items()
    }


def embedding_off_by_a_hundredth(_, tensors):
    return {name: tensor * 1.01 if "embed_tokens" in name else tensor for name, tensor in tensors.items()}


TENSOR_MISTAKES = [
    unpermuted,
    swapped_gate_and_up,
    swapped_norm_weights,
    swapped_query_heads,
    embedding_off_by_a_hundredth,
]


def refused_difference(saved, tmp_path):
    """Export, and return the difference of the logits for which it was refused."""
    said = []
    with pytest.raises(UsageError, match="logits differ by"):
        export(saved("peri").folder, tmp_path / "model", ExportOptions(), say=said.append)
    assert list(tmp_path.iterdir()) == []
    (parity,) = [line for line in said if line.startswith("Parity check")]
    return float(parity.split("fp32: ")[1].split()[0])


@pytest.mark.parametrize("mistake", TENSOR_MISTAKES, ids=lambda mistake: mistake.__name__)
def test_wrong_tensors_are_refused(saved, tmp_path, monkeypatch, mistake):
    stream = exporting.exported_tensors

    def mistaken(read, architecture, *args):
        yield from mistake(architecture, dict(stream(read, architecture, *args))).items()

    monkeypatch.setattr(exporting, "exported_tensors", mistaken)
    assert refused_difference(saved, tmp_path) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1.5625e-07},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12},
    ],
    ids=["eps", "theta", "rotary share", "heads"],
)
def test_wrong_configuration_is_refused(saved, tmp_path, monkeypatch, change):
    configure = exporting.model_config
    monkeypatch.setattr(exporting, "model_config", lambda *args: {**configure(*args), **change})
    assert refused_difference(saved, tmp_path) > 10 * TOLERANCE


def test_a_missing_tensor_is_refused(saved, tmp_path, monkeypatch):
    stream = exporting.exported_tensors
    monkeypatch.setattr(
        exporting, "exported_tensors", lambda *args: (t for t in stream(*args) if "layers.1.mlp" not in t[0])
    )
    with pytest.raises(UsageError, match=r"missing keys in transformers: model\.layers\.1\.mlp"):
        export(saved("peri").folder, tmp_path / "model", ExportOptions(), say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_the_parity_check_are_not_those_of_the_tests():
    ours = sample_tokens(checkpoints.VOCABULARY, checkpoints.POSITIONS)
    assert ours.shape == (2, 64)
    assert not (ours[:, :40] == checkpoints.sample()).all()
