"""An export names the tokens that end, begin and pad as trained, or says that there is none."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from megatron_periln.convert.architecture import Architecture
from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.hf_config import generation_config, model_config
from megatron_periln.convert.model_folder import SpecialTokens
from megatron_periln.convert.targets import TARGETS
from megatron_periln.models.one_process import megatron_config
from tests.convert import checkpoints
from tests.convert.cases import CASES, ONE_PER_TARGET

NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


def write(folder, target, tokens):
    args = checkpoints.arguments(CASES[ONE_PER_TARGET[target]].flags)
    architecture = Architecture.of(megatron_config(args))
    config = model_config(architecture, TARGETS[target], tokens, torch.float32)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation_config(tokens)))
    return AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)


@pytest.mark.parametrize("target", TARGETS)
def test_configurations_name_them(single_process, tmp_path, target):
    for read in write(tmp_path, target, SpecialTokens(bos=3, eos=4, pad=5)):
        assert [getattr(read, name) for name in NAMES] == [3, 4, 5]


@pytest.mark.parametrize("target", TARGETS)
def test_none_is_none(single_process, tmp_path, target):
    config, generation = write(tmp_path, target, SpecialTokens())
    assert [getattr(config, name) or None for name in NAMES] == [None] * 3
    assert [getattr(generation, name) for name in NAMES] == [None] * 3


def test_transformers_still_gives_glm4_tokens_of_its_own(single_process, tmp_path):
    """The negative control: null is not none."""
    write(tmp_path, "glm4", SpecialTokens())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id == [151329, 151336, 151338]


@pytest.mark.parametrize("name", ["peri", "pre"])
def test_generation_stops_where_a_document_ends(single_process, tmp_path, name):
    prompt = checkpoints.sample(1, 8)
    saved = checkpoints.save(tmp_path / "free", CASES[name].flags)
    continued = checkpoints.greedy(saved.logits, prompt, 24)[0].tolist()
    end = continued[10]
    flags = {"tokenizer_type": "NullTokenizer", "vocab_size": 150, "null_tokenizer_eod_id": end}
    checkpoints.save(tmp_path / "ending", CASES[name].flags, **flags)
    for folder, length in (("ending", continued.index(end) + 1), ("free", 24)):
        output = tmp_path / f"{folder} model"
        export(tmp_path / folder, output, ExportOptions(verify=False), say=lambda _: None)
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
        mask = torch.ones_like(prompt)
        generated = model.generate(prompt, attention_mask=mask, max_new_tokens=24, do_sample=False)
        assert generated[0, 8:].tolist() == continued[:length]
