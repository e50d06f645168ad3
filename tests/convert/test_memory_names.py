"""A model that was written with the names that transformers 5 has in memory is imported all the same."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from megatron_periln.convert.hf_config import architecture_of, read_config
from megatron_periln.convert.import_model import ImportOptions, import_model
from megatron_periln.convert.safetensors_folder import Tensors
from megatron_periln.convert.source import memory_names
from megatron_periln.convert.targets import TARGETS
from megatron_periln.errors import UsageError
from tests.convert.published import make, quietly

WEIGHTS = "model.safetensors"
SETTINGS = {
    "minimax": {"num_local_experts": 1, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 3}
}
MIXTURES = [target.name for target in TARGETS.values() if target.mixture or target.name == "minimax"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return two folders of one model: with the names of files, and with those in memory."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            files = make(folder / "files", name, **SETTINGS.get(name, {}))
            model = transformers.AutoModelForCausalLM.from_pretrained(files)
            model.save_pretrained(folder / "memory", save_original_format=False)
            made[name] = files, folder / "memory"
        return made[name]

    return of


def under_names_of_files(folder):
    config, target, said = read_config(folder)
    return memory_names.under_names_of_files(Tensors(folder), architecture_of(config, target), target, said)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_tensors_are_the_same(both, name):
    files, memory = both(name)
    right, stored = load_file(files / WEIGHTS), load_file(memory / WEIGHTS)
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in stored.keys() - right.keys())
    for folder in (files, memory):
        tensors = under_names_of_files(folder)
        assert set(tensors) == right.keys()
        assert all(torch.equal(tensors[key], right[key]) for key in right)
        assert all(tensors.layout(key).shape == list(right[key].shape) for key in right)


@pytest.mark.parametrize("name", ["mixtral", "kolibri1", "minimax"])
def test_logits_are_the_models(single_process, both, tmp_path, name):
    """Those whose other tensors have other names too."""
    said = []
    import_model(both(name)[1], tmp_path / "checkpoint", ImportOptions(), say=said.append)
    (parity,) = [line for line in said if line.startswith("Parity check")]
    assert float(parity.split("fp32: ")[1].split()[0]) <= 1e-5


def test_in_bfloat16_too(single_process, tmp_path):
    """Where the model is filled a second time, in fp32."""
    files = make(tmp_path / "files", "qwen3_moe", torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(files)
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    import_model(tmp_path / "memory", tmp_path / "checkpoint", ImportOptions(), say=quietly)


@pytest.fixture
def refusal(both, refused):
    """Return the one line with which a model is refused after tensors named as in memory were changed."""
    return lambda name, change: refused(both(name)[1], change)


@pytest.mark.parametrize(
    "kind, shape, right", [("gate_up", [6, 64, 96], [6, 96, 64]), ("down", [6, 48, 64], [6, 64, 48])]
)
def test_transposed_matrices(refusal, kind, shape, right):
    """As in transformers' GPT-OSS and Llama 4."""
    key = f"model.layers.1.mlp.experts.{kind}_proj"

    def transpose(tensors):
        tensors[key] = tensors[key].transpose(1, 2)

    assert refusal("qwen3_moe", transpose) == (
        f"SOURCE/{WEIGHTS} has {key} of shape {shape}, and SOURCE/config.json promises {right} "
        "(num_experts 6, moe_intermediate_size 48, hidden_size 64): its matrices are transposed, as "
        "transformers doesn't read them; transpose them"
    )


def test_another_number_of_experts(refusal):
    def shorten(tensors):
        for key in [key for key in tensors if ".experts." in key]:
            tensors[key] = tensors[key][:5]

    line = refusal("mixtral", shorten)
    assert (
        "of shape [5, " in line
        and "(num_local_experts 6, intermediate_size 112, hidden_size 64): correct" in line
    )


def test_both_names(both, refusal):
    name = "model.layers.0.mlp.experts.3.up_proj.weight"

    def add(tensors):
        tensors[name] = load_file(both("qwen3_moe")[0] / WEIGHTS)[name]

    line = refusal("qwen3_moe", add)
    assert (
        line.startswith(f"SOURCE has {name} twice, in ") and "model.layers.0.mlp.experts.gate_up_proj" in line
    )


def test_half_of_the_experts_tensors(refusal):
    line = refusal("qwen3_moe", lambda tensors: tensors.pop("model.layers.1.mlp.experts.down_proj"))
    assert line.startswith(
        "SOURCE has no tensor model.layers.1.mlp.experts.0.down_proj.weight, and SOURCE/config"
    )


def test_gate_and_up_the_other_way_round_are_refused(single_process, both, tmp_path, monkeypatch):
    right = memory_names._parts_of_experts

    def swapped(*args):
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}
        for name, part in right(*args):
            module = name.split(".")[-2]
            yield name.replace(module, other[module]), part

    monkeypatch.setattr(memory_names, "_parts_of_experts", swapped)
    with pytest.raises(UsageError, match="logits differ by"):
        import_model(both("qwen3_moe")[1], tmp_path / "checkpoint", ImportOptions(), say=quietly)


def test_the_other_targets_have_one_name_for_each_tensor():
    """What transformers changes between files and memory is known of those alone that are tried above."""
    gate = "lfm3"  # whose gate of attention, which is not imported, has another name
    changed = {name for name in TARGETS if get_checkpoint_conversion_mapping(name)}
    assert changed - {gate} == set(MIXTURES)
