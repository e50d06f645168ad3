"""The tokenizer goes along with the model."""

import json
import re

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.tokens import texts
from megatron_periln.tools.export_hf import main
from tests.convert import checkpoints
from tests.convert.cases import CASES
from tests.convert.tokens.kinds import pieces


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer's folder with a bos, an eos and a chat template."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "unrelated.txt").write_text("not a tokenizer's")
    return folder


@pytest.mark.parametrize("given", [True, False], ids=["given", "of the checkpoint"])
def test_files_and_special_tokens(single_process, tokenizer, tmp_path, given):
    named = "" if given else f" --tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}"
    saved = checkpoints.save(tmp_path / "checkpoint", CASES["peri"].flags + named)
    said, output = [], tmp_path / "model"
    options = ExportOptions(tokenizer=tokenizer if given else None, verify=False)
    export(saved.folder, output, options, say=said.append)
    (line,) = [line for line in said if line.startswith("Tokenizer: ")]
    assert re.fullmatch(
        f"Tokenizer: tokenizer files of {tokenizer}; ids equal on 1[0-9],[0-9]+ texts, 5 tokens' own text; "
        "end-of-document token 4 </s>",
        line,
    )
    assert any(line.startswith("For llama.cpp, use tools/export_gguf.py") for line in said)
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert copied < {path.name for path in output.iterdir()}
    assert not (output / "unrelated.txt").exists()
    config, generation = (
        json.loads((output / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (3, 4, None)
    assert generation == {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": None}
    assert AutoTokenizer.from_pretrained(output)("a").input_ids == [0]


def test_a_sentencepiece_export_talks(single_process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(texts, "_MIXTURES", 400)
    flags = pieces(tmp_path / "tokenizer", vocab_size=140, byte_fallback=False)
    named = f" --tokenizer-type SentencePieceTokenizer --tokenizer-model {flags.tokenizer_model}"
    checkpoints.save(tmp_path / "checkpoint", CASES["peri"].flags + named)
    output = tmp_path / "model"
    assert main(["--load", str(tmp_path / "checkpoint"), "--output", str(output), "--no-verify"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"; ids equal on [\d,]+ texts, 140 tokens' own text; end-of-document token 2 </s>\n", said
    )
    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    encoded = tokenizer("def wrap(", return_tensors="pt")
    assert encoded.input_ids[0].tolist() == SentencePieceProcessor(flags.tokenizer_model).encode("def wrap(")
    generated = model.generate(**encoded, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(generated[0]).startswith("def wrap(")
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id == 2
