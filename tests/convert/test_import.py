"""Importing a model keeps what it computes, and exporting it again gives its files back."""

import math
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_periln import flag_files
from megatron_periln.checkpoints.manifest import MANIFEST, Manifest
from megatron_periln.checkpoints.reader import Checkpoint
from megatron_periln.convert import import_model as importing
from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.import_model import ImportOptions, import_model
from megatron_periln.convert.parity_check import (
    Outputs,
    checkpoint_outputs,
    compare,
    compare_logits,
    sample_tokens,
    transformers_outputs,
)
from megatron_periln.convert.rope_scaling import RopeScaling
from megatron_periln.errors import UsageError
from megatron_periln.models.one_process import build_model, megatron_config
from tests.convert import checkpoints
from tests.convert.published import LLAMA3, MODELS, SIZES, YARN, make, quietly

MULTIPLIERS = {
    "embedding_multiplier": 10.0,
    "logits_scaling": 0.125,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.05,
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_round_trip(single_process, tmp_path, name):
    source, said = make(tmp_path / "source", name), []
    import_model(source, tmp_path / "checkpoint", ImportOptions(), say=said.append)
    (parity,) = [line for line in said if line.startswith("Parity check")]
    assert float(parity.split("fp32: ")[1].split()[0]) <= 1e-5
    options = ExportOptions(target=name.split(",")[0], verify=False)
    export(tmp_path / "checkpoint", tmp_path / "again", options, say=quietly)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [transformers.AutoConfig.from_pretrained(tmp_path / f).to_dict() for f in ("source", "again")]
    ignored = {"transformers_version", "initializer_range", "eos_token_id", "bos_token_id", "_name_or_path"}
    differ = {key for key in configs[0] if configs[0][key] != configs[1].get(key)} - ignored
    assert not differ, {key: [config.get(key) for config in configs] for key in differ}


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("llama, tied, scaled rotary", ["--use-rope-scaling", "--rope-scaling-factor 8"]),
        ("llama, tied, scaled rotary", []),
        ("llama, linear scaling", ["--rotary-seq-len-interpolation-factor 5"]),
    ],
)
def test_a_wrong_scaling_is_refused(single_process, tmp_path, monkeypatch, name, wrong):
    """By its frequencies, and by the logits far away, both of which the near ones may be too few to see."""
    source = make(tmp_path / "source", name)
    monkeypatch.setattr(RopeScaling, "as_flags", lambda _: [flag.split() for flag in wrong])
    with pytest.raises(UsageError, match="the two models' logits differ by"):
        import_model(source, tmp_path / "refused", ImportOptions(), say=quietly)
    import_model(source, tmp_path / "checkpoint", ImportOptions(verify=False), say=quietly)
    checkpoint, tokens = Checkpoint(tmp_path / "checkpoint"), sample_tokens(160, 64)
    expected = transformers_outputs(source, tokens)
    found = checkpoint_outputs(checkpoint.path, checkpoint.args, tokens)
    same_near = replace(found, logits=expected.logits)
    assert compare(same_near, expected).excess.startswith("rotary frequencies differ by ")
    same_frequencies = replace(same_near, frequencies=expected.frequencies)
    assert "at far positions" in compare(same_frequencies, expected).excess
    assert compare(expected, expected).excess is None


def test_a_model_that_rotates_nothing_has_other_frequencies_than_one_that_does():
    rotated = Outputs(torch.ones(1, 2, 3), torch.ones(1, 2, 3), frequencies=torch.ones(2))
    nothing = replace(rotated, frequencies=torch.empty(0))
    for one, other in ((nothing, rotated), (rotated, nothing)):
        assert compare(one, other).frequencies == math.inf
    assert compare(nothing, nothing).excess is None


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_multipliers_are_folded(single_process, tmp_path, tied):
    source, said = make(tmp_path / "source", "hyperclovax", tie_word_embeddings=tied, **MULTIPLIERS), []
    import_model(source, tmp_path / "checkpoint", ImportOptions(), say=said.append)
    assert "Its multipliers are folded into the weights: an export will have none" in said
    export(tmp_path / "checkpoint", tmp_path / "again", ExportOptions(target="hyperclovax"), say=quietly)
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f) for f in ("source", "again")]
    with torch.no_grad():
        logits = [model(checkpoints.sample()).logits for model in models]
    assert compare_logits(*logits).maximum <= 1e-5


def test_bf16_round_trip(single_process, tmp_path):
    make(tmp_path / "source", "glm4", torch.bfloat16)
    import_model(tmp_path / "source", tmp_path / "checkpoint", ImportOptions(), say=quietly)
    export(tmp_path / "checkpoint", tmp_path / "again", ExportOptions(), say=quietly)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "again"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_tokenizer_comes_back(single_process, byte_tokenizer, tmp_path, config_of):
    source, said = make(tmp_path / "source", "glm4"), []
    shutil.copytree(byte_tokenizer, source, dirs_exist_ok=True)
    import_model(source, tmp_path / "checkpoint", ImportOptions(verify=False), say=quietly)
    export(tmp_path / "checkpoint", tmp_path / "again", ExportOptions(verify=False), say=said.append)
    (line,) = [line for line in said if line.startswith("Tokenizer")]
    eos = config_of(tmp_path / "again")["eos_token_id"]
    assert line.startswith(f"Tokenizer: tokenizer files of {source}; ids equal on ")
    assert line.endswith(f"; end-of-document token {eos} <|endoftext|>")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again").eos_token_id == eos
    assert type(eos) is int


def test_without_a_tokenizer_nothing_is_made_up(single_process, tmp_path):
    source, said = make(tmp_path / "source", "glm4"), []
    import_model(source, tmp_path / "checkpoint", ImportOptions(verify=False), say=quietly)
    export(tmp_path / "checkpoint", tmp_path / "again", ExportOptions(verify=False), say=said.append)
    expected = "Tokenizer: no tokenizer files: the checkpoint names none; --tokenizer PATH adds them"
    assert expected in said


def test_the_checkpoint_has_a_manifest(single_process, tmp_path):
    make(tmp_path / "source", "glm4")
    import_model(tmp_path / "source", tmp_path / "checkpoint", ImportOptions(verify=False), say=quietly)
    path = tmp_path / "checkpoint" / "release"
    manifest = Manifest.read(path)
    assert manifest.has_sums
    assert {file.name for file in manifest.files} | {MANIFEST} == {file.name for file in path.iterdir()}
    manifest.check_sums(path)


def test_training_goes_on_with_the_flag_file(jobs, tmp_path):
    """On two ranks, with a vocabulary that two don't divide, which its trained checkpoint still knows."""
    source = make(tmp_path / "source", "glm4", vocab_size=383)
    options = ImportOptions(vocabulary_multiple=2)
    import_model(source, tmp_path / "checkpoint", options, say=quietly)
    flags = flag_files.expand([f"@{tmp_path / 'checkpoint' / 'model.flags'}"])
    training = "--train-iters 1 --lr 0 --min-lr 0 --save-interval 1 --weight-decay 0"
    layout = "--tensor-model-parallel-size 2 --sequence-parallel"
    job = jobs.run("imported", f"{shlex.join(flags)} {training} {layout}", ranks=2)
    assert len(job.curve) == 1
    trained = Checkpoint(job.folder / "checkpoints")
    tokens = checkpoints.sample()
    expected = checkpoint_outputs(tmp_path / "checkpoint" / "release", trained.args, tokens)
    assert compare(checkpoint_outputs(trained.path, trained.args, tokens), expected).maximum <= 1e-6
    options = ExportOptions(verify=False, with_tokenizer=False)
    export(job.folder / "checkpoints", tmp_path / "again", options, say=quietly)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "again"))
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["glm4", "hyperclovax, tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_padded_vocabulary_comes_back_cut(single_process, tmp_path, config_of, name, dtype):
    """As after added tokens: a prime number of ids, which no tensor parallelism divides."""
    source, said, exporting = make(tmp_path / "source", name, vocab_size=157), [], []
    options = ImportOptions(dtype=dtype, vocabulary_multiple=8)
    import_model(source, tmp_path / "checkpoint", options, say=said.append)
    assert "Its vocabulary of 157 is padded to 160: an export will have 157" in said
    table = Checkpoint(tmp_path / "checkpoint").read("embedding.word_embeddings.weight")
    assert table.shape == (160, 64)
    assert not table[157:].any() and table[156].any()
    options = ExportOptions(target=name.split(",")[0])
    export(tmp_path / "checkpoint", tmp_path / "again", options, say=exporting.append)
    assert "The vocabulary of 160 is cut to the 157 of the imported model" in exporting
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].to(dtype), after[key]) for key in before)
    assert config_of(tmp_path / "again")["vocab_size"] == 157


def test_without_padding_nothing_is_cut(single_process, tmp_path, config_of):
    source, said = make(tmp_path / "source", "glm4"), []
    options = ImportOptions(verify=False, vocabulary_multiple=8)
    import_model(source, tmp_path / "checkpoint", options, say=said.append)
    export(tmp_path / "checkpoint", tmp_path / "again", ExportOptions(verify=False), say=said.append)
    assert not [line for line in said if "vocabulary" in line]
    assert "--unpadded-vocab-size" not in (tmp_path / "checkpoint" / "model.flags").read_text()
    assert config_of(tmp_path / "again")["vocab_size"] == 160


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama", {"hidden_act": "gelu"}, "the model has hidden_act gelu, and Megatron has nothing for"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 32},
            "the model has use_sliding_window True",
        ),
        ("afmoe", {"layer_types": ["chunked_attention"] * 3}, "has layer_types chunked_attention"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
            "scales its rotary frequencies by .*'factor': 2.5",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "scales its rotary frequencies by .*'dynamic'",
        ),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "'low_freq_factor': 2.0"),
        ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.0}}, "'attention_factor': 1.0"),
        ("glm4", {"rope_parameters": YARN}, "has YaRN and rotates neighbours"),
        ("llama", {"attention_bias": True}, "has biases in proj, qkv only"),
        ("gemma2", {}, "is a gemma2, which can't be imported: it caps the scores of attention"),
        (
            "olmo3",
            {"rope_scaling": {**YARN, "rope_theta": 500000.0}},
            "the model's layers rotate otherwise with a window than without",
        ),
        ("gpt2", {}, "is a gpt2; those that can be imported are glm4, hyperclovax"),
    ],
)
def test_what_megatron_has_nothing_for_is_refused(single_process, tmp_path, name, changes, message):
    config = transformers.AutoConfig.for_model(name, **(SIZES if name != "gpt2" else {}), **changes)
    config.save_pretrained(tmp_path / "source")
    with pytest.raises(UsageError, match=message):
        import_model(tmp_path / "source", tmp_path / "checkpoint", ImportOptions(), say=quietly)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_fp32_is_rounded(single_process, tmp_path, dtype):
    """Which moves the logits further than rounding in fp32 does."""
    source, said = make(tmp_path / "source", "llama"), []
    import_model(source, tmp_path / "checkpoint", ImportOptions(dtype=dtype), say=said.append)
    (parity,) = [line for line in said if line.startswith("Parity check")]
    assert float(parity.split("fp32: ")[1].split()[0]) <= 1e-5
    (rounded,) = [line for line in said if line.startswith("Rounding to")]
    assert 1e-4 < float(rounded.split("up to ")[1].split()[0]) < 0.2
    export(tmp_path / "checkpoint", tmp_path / "again", ExportOptions(), say=quietly)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "again"))
    assert all(torch.equal(before[key].to(dtype), after[key]) for key in before)


def test_a_wrong_rounding_is_refused(single_process, tmp_path, monkeypatch):
    source, save = make(tmp_path / "source", "llama"), importing.save_model

    def save_another(folder, args, model):
        model.decoder.layers[1].mlp.linear_fc1.weight.data[3, 5] *= 1.01
        return save(folder, args, model)

    monkeypatch.setattr(importing, "save_model", save_another)
    with pytest.raises(UsageError, match=r"layers.1.mlp.linear_fc1.weight was not saved as it was computed"):
        import_model(source, tmp_path / "checkpoint", ImportOptions(dtype=torch.bfloat16), say=quietly)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_import_is_refused(single_process, tmp_path, monkeypatch, dtype):
    make(tmp_path / "source", "llama")
    right = importing.imported_tensor

    def swapped(get, architecture, target, key, *place):
        tensor = right(get, architecture, target, key, *place)
        return tensor.roll(len(tensor) // 2, 0) if key == "decoder.layers.mlp.linear_fc1.weight" else tensor

    monkeypatch.setattr(importing, "imported_tensor", swapped)
    with pytest.raises(UsageError, match="logits differ by"):
        import_model(tmp_path / "source", tmp_path / "checkpoint", ImportOptions(dtype=dtype), say=quietly)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_truncated_download_is_refused(single_process, tmp_path):
    source = make(tmp_path / "source", "llama")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"holds no model\.safetensors .*other formats are not read"):
        import_model(source, tmp_path / "checkpoint", ImportOptions(), say=quietly)


def test_imported_model_is_built_as_its_flags_say(single_process, tmp_path):
    make(tmp_path / "source", "glm4")
    import_model(tmp_path / "source", tmp_path / "checkpoint", ImportOptions(verify=False), say=quietly)
    text = (tmp_path / "checkpoint" / "model.flags").read_text()
    flags = " ".join(line for line in text.splitlines() if not line.startswith(("--load", "--tokenizer")))
    from_flags = megatron_config(checkpoints.arguments(f"{flags} --seq-length 64"))
    saved = megatron_config(Checkpoint(tmp_path / "checkpoint").args)
    shapes = [
        {name: parameter.shape for name, parameter in build_model(config).named_parameters()}
        for config in (from_flags, saved)
    ]
    assert shapes[0] == shapes[1]
    assert from_flags.norm_placement == saved.norm_placement
    assert from_flags.transformer.rotary_interleaved
