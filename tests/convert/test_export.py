"""An exported model computes what Megatron's does."""

import re
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_periln.convert import export as exporting
from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.parity_check import compare_logits
from megatron_periln.convert.targets import TARGETS
from megatron_periln.convert.weights import exported_tensors
from megatron_periln.errors import UsageError
from tests.convert import checkpoints
from tests.convert.cases import CASES, ONE_PER_TARGET

each_case = pytest.mark.parametrize("name", CASES)
each_target = pytest.mark.parametrize("name", ONE_PER_TARGET.values())


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_every_target_has_a_case():
    assert ONE_PER_TARGET.keys() == TARGETS.keys()


@each_case
def test_logits_are_megatrons(saved, exported, name):
    folder, said = exported(name)
    tokens = checkpoints.sample()
    with torch.no_grad():
        difference = compare_logits(load(folder)(tokens).logits, saved(name).logits(tokens))
    assert difference.maximum <= 1e-5
    assert 0.2 < difference.scale < 5
    (parity,) = [line for line in said if line.startswith("Parity check")]
    assert float(re.search(r"fp32: (\S+)", parity)[1]) <= 1e-5


@each_case
def test_target_and_tying(exported, config_of, name):
    case = CASES[name]
    folder, said = exported(name)
    config = config_of(folder)
    assert config["model_type"] == case.target
    assert config["architectures"] == [TARGETS[case.target].architecture]
    assert config["tie_word_embeddings"] is case.tied
    tensors = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not case.tied
    assert said[0].startswith(f"Target {case.target} ({TARGETS[case.target].architecture}): ")


@each_target
def test_greedy_generation_with_a_cache_is_megatrons_argmax(saved, exported, name):
    prompt = checkpoints.sample(2, 8)
    generated = load(exported(name)[0]).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    expected = checkpoints.greedy(saved(name).logits, prompt, 24)
    assert len(expected.unique()) > 2
    assert torch.equal(generated[:, 8:], expected)


def test_rotary_parameters_are_written_for_transformers_4_and_5(exported, config_of):
    config = config_of(exported("peri, half rotary")[0])
    assert config["rope_parameters"] == {
        "rope_theta": 500.0,
        "rope_type": "default",
        "partial_rotary_factor": 0.5,
    }
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (500.0, 0.5)
    config = config_of(exported("pre, biases, scaled rotary")[0])
    assert config["rope_scaling"]["rope_type"] == config["rope_parameters"]["rope_type"] == "llama3"


def test_shards_and_index(saved, exported, tmp_path):
    whole = load_file(exported("peri")[0] / "model.safetensors")
    folder = tmp_path / "sharded"
    export(saved("peri").folder, folder, ExportOptions(shard_bytes=100_000, verify=False), say=lambda _: None)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sharded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)
    with torch.no_grad():
        tokens = checkpoints.sample()
        assert torch.equal(load(folder)(tokens).logits, load(exported("peri")[0])(tokens).logits)


@pytest.mark.parametrize("name", ["peri", "pre"])
def test_rounded_export_is_checked_in_fp32(saved, exported, tmp_path, name):
    said = []
    options = ExportOptions(dtype=torch.bfloat16)
    export(saved(name).folder, tmp_path / "model", options, say=said.append)
    rounded, exact = (load_file(f / "model.safetensors") for f in (tmp_path / "model", exported(name)[0]))
    assert rounded.keys() == exact.keys()
    assert all(torch.equal(rounded[key], exact[key].bfloat16()) for key in exact)
    (parity,) = [line for line in said if line.startswith("Parity check")]
    assert float(re.search(r"fp32: (\S+)", parity)[1]) <= 1e-5
    (rounding,) = [line for line in said if line.startswith("Rounding to bfloat16")]
    assert float(re.search(r"up to (\S+)", rounding)[1]) > 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bf16_checkpoint_keeps_its_dtype(single_process, tmp_path):
    flags = CASES["pre"].flags + " --bf16"
    saved = checkpoints.save(tmp_path / "checkpoint", flags)
    said = []
    export(saved.folder, tmp_path / "model", ExportOptions(), say=said.append)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    parameters = dict(saved.model.named_parameters())
    assert torch.equal(tensors["lm_head.weight"], parameters["output_layer.weight"])
    assert not [line for line in said if line.startswith("Rounding")]  # nothing was folded


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            checkpoints.COMMON + "--norm-placement output",
            "nearest is exaone4: it has no norm of queries and keys, and exaone4 has. "
            "A model trained with --qk-layernorm could be",
        ),
        (checkpoints.COMMON + "--norm-placement post", "nearest is minimax: it has no embedding norm"),
        (
            checkpoints.BIASES + "--norm-placement peri --rotary-percent 0.5",
            "it has biases (mlp, proj) that glm4 has not",
        ),
        (
            checkpoints.COMMON.replace("RMSNorm", "LayerNorm") + "--norm-placement pre",
            "its norms are LayerNorms. A model trained with --normalization RMSNorm could be",
        ),
        (checkpoints.COMMON.replace("--swiglu", ""), "its MLP is not SwiGLU. A model trained with --swiglu"),
        (
            checkpoints.COMMON.replace("--position-embedding-type rope", ""),
            "its positions are not rotary. A model trained with --position-embedding-type rope",
        ),
    ],
)
def test_what_no_target_expresses_is_refused_with_the_nearest_change(
    single_process, tmp_path, flags, message
):
    saved = checkpoints.save(tmp_path / "checkpoint", flags)
    with pytest.raises(UsageError, match=re.escape(message)):
        export(saved.folder, tmp_path / "model", ExportOptions(), say=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_target_that_computes_something_else_is_refused(saved, tmp_path):
    with pytest.raises(
        UsageError, match="can't be exported to llama: its norm placement is peri and llama's"
    ):
        export(saved("peri").folder, tmp_path / "model", ExportOptions(target="llama"), say=lambda _: None)


def test_one_shard_and_one_layer_are_held_at_a_time(saved, tmp_path, monkeypatch):
    alive, most = {}, 0

    def watched(*args):
        nonlocal most
        for number, (name, tensor) in enumerate(exported_tensors(*args)):
            alive[number] = tensor.nbytes
            weakref.finalize(tensor, alive.pop, number)
            most = max(most, sum(alive.values()))
            yield name, tensor
            del tensor

    monkeypatch.setattr(exporting, "exported_tensors", watched)
    options = ExportOptions(dtype=torch.bfloat16, shard_bytes=40_000, verify=False)
    export(saved("peri").folder, tmp_path / "model", options, say=lambda _: None)
    total = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert total > 150_000
    assert 20_000 < most <= 80_000
