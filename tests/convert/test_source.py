"""A model whose files disagree, or hold what is no weight, is refused in one line, with --no-verify too."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.import_model import ImportOptions, import_model
from megatron_periln.errors import UsageError
from tests.convert.published import MODELS, make, quietly

FULL = ["full_attention"] * 3
WEIGHTS = "model.safetensors"
EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return the folder of a model, made when first asked for."""
    made = {}

    def of(name):
        if name not in made:
            settings = {"minimax": {"num_local_experts": 1, "num_experts_per_tok": 1, "layer_types": FULL}}
            folder = tmp_path_factory.mktemp("published")
            made[name] = make(folder, name, **settings.get(name, {}))
        return made[name]

    return of


@pytest.fixture
def refusal(published, refused):
    """Return the one line with which a model is refused, after its configuration and tensors were changed."""
    return lambda name, *change, **changes: refused(published(name), *change, **changes)


@pytest.mark.parametrize("name", ["minimax", "llama"])
def test_what_agrees_is_imported(single_process, published, tmp_path, name):
    import_model(published(name), tmp_path / "checkpoint", ImportOptions(), say=quietly)


@pytest.mark.parametrize(
    "dtype, stored", [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8")]
)
def test_numbers_that_are_no_weights(refusal, dtype, stored):
    """As FP8 without its scales, which were read as numbers."""

    def quantize(tensors):
        tensors[UP] = tensors[UP].to(dtype)

    line = refusal("llama", quantize)
    assert line.startswith(f"SOURCE/{WEIGHTS} has {UP} in {stored}, and only float32, bfloat16, float16 are")


def test_scales_beside_weights(refusal):
    def add_scale(tensors):
        tensors[f"{UP}_scale_inv"] = torch.ones(1, 1)

    line = refusal("llama", add_scale)
    assert line == f"SOURCE/{WEIGHTS} has {UP}_scale_inv, for which LlamaForCausalLM has no place"


def test_an_output_layer_of_its_own_that_is_called_tied(single_process, refusal, published, tmp_path):
    line = refusal("llama", tie_word_embeddings=True)
    assert line.startswith(
        "SOURCE/config.json has tie_word_embeddings true, and SOURCE/model.safetensors has "
    )
    assert "lm_head.weight, another table than model.embed_tokens.weight; write" in line
    # The same table twice is none of its own.
    same = shutil.copytree(published("llama, tied, biases"), tmp_path / "same")
    tensors = load_file(same / WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors[EMBEDDING].clone()}, same / WEIGHTS)
    import_model(same, tmp_path / "checkpoint", ImportOptions(verify=False), say=quietly)


@pytest.mark.parametrize(
    "key", ["full_attn_alpha_factor", "full_attn_beta_factor", "mlp_alpha_factor", "mlp_beta_factor"]
)
def test_factors_of_minimax(refusal, key):
    assert refusal("minimax", **{key: 2.5}).startswith(f"the model has {key} 2.5, and Megatron has nothing")


@pytest.mark.parametrize(
    "key, settings, method",
    [
        (
            "quantization_config",
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "bitsandbytes, load_in_8bit",
        ),
        (
            "quantization_config",
            {"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            'bitsandbytes, load_in_4bit true, bnb_4bit_quant_type "nf4"',
        ),
        ("quantization_config", {"load_in_4bit": True}, "bitsandbytes, load_in_4bit"),
        ("quantization_config", {"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq, bits 4"),
        ("quantization_config", {"something": "new"}, "no method named"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("quantization", {"group_size": 64, "bits": 4}, "no method named, bits 4"),
    ],
)
def test_a_quantized_model(refusal, key, settings, method):
    line = refusal("llama", **{key: settings})
    assert line.startswith(f"SOURCE/config.json has a {key} ({method}")
    assert "quantized weights are not imported; give the model from which they were made" in line


def test_no_window_and_no_types_of_layers(refusal):
    line = refusal("exaone4", without=["layer_types"], sliding_window=None)
    assert line.startswith(
        "SOURCE/config.json has sliding_window null and no layer_types, which transformers can't"
    )
    assert 'add "layer_types" there, 3 times "full_attention"' in line
    line = refusal("exaone4", without=["layer_types"], sliding_window=32, sliding_window_pattern=0)
    assert line.startswith("SOURCE/config.json has sliding_window_pattern 0 and no layer_types")


def test_a_padding_token_that_the_vocabulary_lacks(refusal):
    line = refusal("glm4", without=["pad_token_id"])
    assert line.startswith(
        "SOURCE/config.json has no pad_token_id, for which transformers takes 151329, and vocab_size 160"
    )
    assert 'write "pad_token_id": null there' in line
    assert "config.json has pad_token_id 160, and vocab_size 160" in refusal("llama", pad_token_id=160)


@pytest.mark.parametrize(
    "name, key, value, found",
    [
        ("llama", "vocab_size", 170, "160: "),
        ("llama", "hidden_size", 72, "64: "),
        ("llama", "intermediate_size", 224, "112: "),
        ("glm4", "intermediate_size", 56, "112: "),
        ("llama", "num_attention_heads", 8, "4 (96): "),
        ("llama", "num_key_value_heads", 4, "2 (48): "),
        ("exaone4", "head_dim", 32, "24: "),
    ],
)
def test_a_size_that_the_tensors_have_not(refusal, name, key, value, found):
    line = refusal(name, **{key: value})
    assert line.startswith(f"SOURCE/config.json has {key} {value}")
    assert f"and its tensors {found}SOURCE/{WEIGHTS} has " in line


@pytest.mark.parametrize("layers", [2, 4])
def test_another_number_of_layers(refusal, layers):
    line = refusal("llama", num_hidden_layers=layers)
    said = f"SOURCE/config.json has num_hidden_layers {layers}, and the tensors in SOURCE are of 3 layers; "
    assert line.startswith(said)


def test_a_size_that_is_not_written(refusal):
    line = refusal("llama", without=["intermediate_size"])
    assert line.startswith(
        "SOURCE/config.json has no intermediate_size, for which transformers takes 11008, and "
    )


def test_heads_that_are_not_as_transformers_takes_them(refusal):
    line = refusal("llama", num_key_value_heads=None)
    assert line.startswith(
        "SOURCE/config.json has num_key_value_heads null, for which transformers takes 4 ("
    )
    assert "(head_dim 16, num_attention_heads 4" in refusal("llama", without=["head_dim"])


def test_tensors_that_are_missing_or_too_many(refusal):
    line = refusal("glm4", attention_bias=False)
    assert ".q_proj.bias, " in line and line.endswith(
        "config.json says false, or nothing, for attention_bias"
    )
    line = refusal("llama", attention_bias=True, mlp_bias=True)
    assert line.startswith(
        "SOURCE has no tensor model.layers.0.self_attn.q_proj.bias, and SOURCE/config.json has "
    )
    assert "attention_bias true" in line
    line = refusal("llama", lambda tensors: tensors.pop("lm_head.weight"))
    assert line.startswith(
        "SOURCE has no tensor lm_head.weight, and SOURCE/config.json has tie_word_embeddings fal"
    )
    line = refusal("llama", lambda tensors: tensors.pop(UP))
    assert line.startswith(f"SOURCE has no tensor {UP}, and SOURCE/config.json promises it")


@pytest.mark.parametrize(
    "rename",
    [lambda name: name.removeprefix("model."), lambda name: f"language_model.{name}"],
    ids=["of a model without its head", "of a part of a larger model"],
)
def test_tensors_that_are_named_otherwise(refusal, rename):
    def change(tensors):
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    line = refusal("llama", change)
    assert line.startswith("SOURCE has ") and rename(EMBEDDING) in line
    assert " more, and no tensor called model.layers.0" in line
    assert line.endswith("as LlamaForCausalLM has them in files; write the folder with its save_pretrained")


def test_an_adapter_that_is_not_merged(refusal, tmp_path):
    def change(tensors):
        tensors[UP.replace("up_proj", "up_proj.base_layer")] = tensors.pop(UP)
        tensors[UP.replace("up_proj", "up_proj.lora_A.default")] = torch.ones(2, 64)

    line = refusal("llama", change)
    assert line.startswith(f"SOURCE/{WEIGHTS} has ") and "an adapter that is not merged" in line
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(UsageError, match=r"holds an adapter alone .*; merge it into its model first"):
        import_model(tmp_path, tmp_path / "checkpoint", ImportOptions(), say=quietly)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_no_numbers(single_process, refusal, value):
    def change(tensors):
        tensors[UP][3, 5] = value

    line = refusal("llama", change)
    assert line.startswith(f"SOURCE/{WEIGHTS} has {UP} with values that are NaN or infinite, from which")


def test_values_beyond_float16(single_process, published, tmp_path):
    """Of a model in bfloat16, which has numbers a great deal larger."""
    source = shutil.copytree(published("llama"), tmp_path / "source")
    tensors = load_file(source / WEIGHTS)
    tensors[UP][3, 5] = 7e4
    save_file(tensors, source / WEIGHTS)
    options = ImportOptions(dtype=torch.float16, verify=False)
    with pytest.raises(UsageError, match=r"values up to 7e\+04, in what becomes .*fc1.*, beyond float16;"):
        import_model(source, tmp_path / "checkpoint", options, say=quietly)
    import_model(source, tmp_path / "checkpoint", ImportOptions(verify=False), say=quietly)
    options = ExportOptions(dtype=torch.float16, verify=False)
    with pytest.raises(UsageError, match=rf"{UP} would have values that are .* float16; float16 ends at"):
        export(tmp_path / "checkpoint", tmp_path / "again", options, say=quietly)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "key, value",
    [
        ("intermediate_size", 0),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", -1),
        ("head_dim", -1),
    ],
)
def test_sizes_of_nothing(refusal, key, value):
    line = refusal("llama", **{key: value})
    assert line == f"SOURCE/config.json has {key} {value}, which must be a whole number above 0"


@pytest.mark.parametrize("theta", [None, 0, -1.0, 0.5, math.inf, math.nan])
def test_a_rotary_base_that_is_none(refusal, theta):
    line = refusal("llama", rope_parameters={"rope_type": "default", "rope_theta": theta})
    assert line == f"the model has rope_theta {theta}; Megatron's --rotary-base is a whole number above 0"


def test_frequencies_of_old_checkpoints_are_passed_over(single_process, published, tmp_path):
    """As transformers does."""
    source = shutil.copytree(published("llama"), tmp_path / "source")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}
    save_file(load_file(source / WEIGHTS) | frequencies, source / WEIGHTS)
    import_model(source, tmp_path / "checkpoint", ImportOptions(verify=False), say=quietly)


def test_one_file_beside_the_index_of_others(single_process, published, tmp_path):
    """transformers reads the one file."""
    source = shutil.copytree(published("llama"), tmp_path / "source")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBEDDING: "gone"}}))
    import_model(source, tmp_path / "checkpoint", ImportOptions(verify=False), say=quietly)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(published, tmp_path, text):
    source = shutil.copytree(published("llama"), tmp_path / "source")
    (source / WEIGHTS).rename(source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UsageError, match=r"index\.json is no index of safetensors files; download it again"):
        import_model(source, tmp_path / "checkpoint", ImportOptions(), say=quietly)


def test_a_file_that_is_cut_off(published, tmp_path):
    source = shutil.copytree(published("llama"), tmp_path / "source")
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"model\.safetensors can't be read: .*; download it again"):
        import_model(source, tmp_path / "checkpoint", ImportOptions(), say=quietly)


def test_the_changes_are_of_models_that_are_imported():
    assert {"llama", "glm4", "exaone4", "llama, tied, biases"} <= MODELS.keys()
