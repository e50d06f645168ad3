"""The pre-tokenizer that an export's GGUF file names, and ids and logits of the file in llama.cpp."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.gguf import converter
from megatron_periln.convert.gguf.graphs import check_graph, window_of
from megatron_periln.convert.gguf.pre_tokenizers import PRE_TOKENIZERS, rank
from megatron_periln.convert.gguf.processes import LlamaCpp
from megatron_periln.convert.gguf.write import GGUFOptions, write_gguf
from megatron_periln.convert.targets import TARGETS
from megatron_periln.convert.tokens.texts import FEATURES
from megatron_periln.data.tokenizer_training.train import SPLITS
from megatron_periln.data.tokenizers.probes import probe_texts
from megatron_periln.errors import UsageError
from tests.convert import checkpoints
from tests.convert.cases import CASES
from tests.convert.tokens.kinds import pieces, tiktoken, vocabulary_files

TEXTS = [text for texts in FEATURES.values() for text in texts] + [
    text for text in probe_texts(mixtures=150) if "'\u017f" not in text
]
NAMED = {each.name: each for each in PRE_TOKENIZERS}
VARIABLE = "MEGATRON_PERILN_LLAMA_CPP"
with_llama_cpp = pytest.mark.skipif(
    VARIABLE not in os.environ, reason=f"{VARIABLE} names no folder that make test-llama-cpp has made"
)


def tokenizer(*steps, ignore_merges=False):
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return made


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    "made, name",
    [
        (tokenizer(split(SPLITS["llama3"]), BYTES), "dbrx"),
        (tokenizer(split(SPLITS["llama3"]), BYTES, ignore_merges=True), "llama-bpe"),
        (tokenizer(GPT_2), "gpt-2"),
        (tokenizer(pre_tokenizers.Digits(individual_digits=True), GPT_2), "starcoder"),
        (tokenizer(split(SPLITS["llama3"].replace("{1,3}", "")), BYTES), "qwen2"),
    ],
)
def test_the_name_is_that_of_the_same_splits(made, name):
    """Those of ``train_tokenizer.py`` among them; the negative controls are the other names."""
    (first, none), *others = rank(made, TEXTS)
    assert (first.name, none) == (name, 0)
    same = {each.name for each, count in others if count == 0}
    twins = ("dbrx", "llama-bpe") if name in ("dbrx", "llama-bpe") else ("qwen2", "bailingmoe")
    assert same <= set(twins)
    assert all(count > 0 for each, count in others if each.name in {"default", "gpt-4o", "falcon"} - {name})


def test_that_of_no_name_is_told():
    """Sequences of two digits, which none of llama.cpp's makes."""
    made = tokenizer(split(SPLITS["llama3"].replace("{1,3}", "{1,2}")), BYTES)
    assert rank(made, TEXTS)[0][1] > 0


def test_a_normalizer_is_counted():
    """llama.cpp has none for byte-level BPE."""
    made = tokenizer(split(SPLITS["llama3"]), BYTES)
    made.normalizer = normalizers.Lowercase()
    assert rank(made, ["ABC def"])[0][1] > 0


def test_every_pattern_keeps_the_whole_text():
    for each in PRE_TOKENIZERS:
        for text in TEXTS[:60]:
            assert "".join(each.split(text)) == text, each.name
    assert NAMED["dbrx"].split("it's 12345") == ["it", "'s", " ", "123", "45"]
    assert NAMED["gpt-2"].split("it's 12345") == ["it", "'s", " 12345"]


@pytest.fixture(scope="module")
def model(saved, trained, tmp_path_factory):
    """An export of Peri-LN with a tokenizer that is nobody else's, without ``<|user|>``."""
    folder = tmp_path_factory.mktemp("gguf") / "model"
    export(saved("peri").folder, folder, ExportOptions(tokenizer=trained, verify=False), say=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    made = Tokenizer(models.BPE())
    # As train_tokenizer.py does, with an alphabet that fits the vocabulary of the models here.
    made.pre_tokenizer = pre_tokenizers.Sequence([split(SPLITS["llama3"]), BYTES])
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: checkpoints.VOCABULARY - 10]
    trainer = trainers.BpeTrainer(
        vocab_size=checkpoints.VOCABULARY - 4,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(["12 12 123 123 ab ab"], trainer)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tiktoken_in(folder):
    folder.mkdir()
    return tiktoken(folder)


NOWHERE = LlamaCpp(Path("nowhere"), sys.executable)


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("config.json", {"architectures": ["Lfm3ForCausalLM"]}, "llama.cpp is not known to compute Lfm3"),
        ("config.json", {"architectures": ["Exaone4ForCausalLM"]}, "heads to be of the hidden size together"),
        ("tokenizer.json", None, "holds no tokenizer.json"),
    ],
)
def test_what_llama_cpp_has_not_is_one_line(model, tmp_path, file, changes, message):
    folder = tmp_path / "changed"
    shutil.copytree(model, folder)
    if changes is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    with pytest.raises(UsageError, match=message):
        write_gguf(folder, tmp_path / "new.gguf", GGUFOptions(llama_cpp=NOWHERE))
    assert not (tmp_path / "new.gguf").exists()


def configuration(folder, target, layers=4, **changes):
    """Write a config.json, whose other settings are transformers' own."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": layers}
    names = {"architectures": [TARGETS[target].architecture], "model_type": target}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(names | sizes | changes))
    return folder


def rotary(kind, **more):
    return {"rope_parameters": {"rope_theta": 1e4, "rope_type": kind, "factor": 4.0} | more}


def by_kind(windowed, full):
    return {"rope_parameters": {WINDOW: windowed["rope_parameters"], FULL: full["rope_parameters"]}}


LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"original_max_position_embeddings": 4096}
WINDOW, FULL = "sliding_attention", "full_attention"
PLAIN = {"sliding_window": None, "layer_types": [FULL] * 4}
WINDOWS = {"sliding_window": 8, "layer_types": [WINDOW] * 3 + [FULL]}
OLMO_3 = {  # as published
    "rope_theta": 500000,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
}
BY_TWO = {"sliding_window": 8, "layer_types": [WINDOW, FULL] * 2}


@pytest.mark.parametrize(
    "target, settings, message",
    [
        ("qwen3", rotary("llama3", **LLAMA_3), "no scaling by llama3"),
        ("olmo2", rotary("llama3", **LLAMA_3), "no scaling by llama3"),
        ("glm4_moe", rotary("llama3", **LLAMA_3), "no scaling by llama3"),
        ("llama", rotary("dynamic"), "no scaling by dynamic"),
        ("llama", rotary("yarn", truncate=False, **YARN), "bounds of yarn"),
        ("glm4", rotary("yarn", beta_fast=4, **YARN), "beta_fast of yarn to be 32; it is 4"),
        ("qwen2_moe", rotary("yarn", beta_slow=0.25, **YARN), "beta_slow of yarn to be 1; it is 0.25"),
        ("qwen3", rotary("yarn", attention_factor=1.0, **YARN), "attention_factor .* 1.13863; it is 1.0"),
        ("llama", rotary("yarn", mscale=1.0, mscale_all_dim=0.5, **YARN), "no mscale; it is 1.0"),
        ("llama", rotary("yarn", mscale_all_dim=0.5, **YARN), "no mscale_all_dim; it is 0.5"),
        ("exaone4", WINDOWS, "to have windows if it has 64 layers, and else none; it has 4 and windows"),
        ("exaone4", {**PLAIN, "layers": 64, "layer_types": [FULL] * 64}, "it has 64 and no windows"),
        (
            "exaone4",
            PLAIN | {"sliding_window": 8},
            "positions in all .* in none, because sliding_window is 8",
        ),
        ("afmoe", BY_TWO, "every fourth layer of an AFMoE"),
        ("afmoe", PLAIN, "every fourth layer of an AFMoE"),
        ("mixtral", {"sliding_window": 8}, "all layers to see all tokens before; it has sliding_window 8"),
        ("mixtral", PLAIN | {"sliding_window": 8}, "it has sliding_window 8"),
        ("olmo2", {"sliding_window": 8}, r"in transformers it has none; take sliding_window \(8\) out"),
        ("qwen3", WINDOWS | {"use_sliding_window": True}, "it has sliding_window 8"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob to be False .train with --moe-router-pre"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob to be True .train without --moe-router-pre"),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, "every layer to have experts"),
        ("olmo2", {"head_dim": 24}, "4 of 24, and a size of 64"),
        ("olmo3", WINDOWS | by_kind(rotary("linear"), rotary("linear")), "they are scaled by linear"),
        ("olmo3", WINDOWS | by_kind(rotary("linear"), rotary("default")), "they are scaled by linear"),
        (
            "olmo3",
            WINDOWS | by_kind(rotary("default"), rotary("yarn", rope_theta=5e5, **YARN)),
            "rope_theta of those without; they have 10000.0 and 500000.0",
        ),
    ],
)
def test_what_llama_cpp_takes_otherwise_is_refused(tmp_path, target, settings, message):
    with pytest.raises(UsageError, match=f"config.json: llama.cpp takes .*{message}"):
        check_graph(configuration(tmp_path / "model", target, **settings))


@pytest.mark.parametrize(
    "target, settings, window",
    [
        ("qwen3", rotary("linear"), None),
        ("llama", rotary("llama3", **LLAMA_3), None),
        ("mixtral", rotary("yarn", **YARN), None),
        ("exaone4", PLAIN, None),
        ("exaone4", WINDOWS | {"layers": 64, "layer_types": WINDOWS["layer_types"] * 16}, 8),
        ("afmoe", WINDOWS, 8),
        ("olmo3", BY_TWO, 8),
        ("olmo3", WINDOWS | OLMO_3, 8),
        ("olmo3", WINDOWS | by_kind(rotary("default"), rotary("linear")), 8),
        ("olmo3", PLAIN | by_kind(rotary("linear"), rotary("default")), None),
        ("llama", {"sliding_window": 4096}, None),
        ("glm4", WINDOWS, None),
        ("glm4", rotary("yarn", attention_factor=1.1386294361, beta_fast=None, **YARN), None),
        ("llama", {"architectures": ["LlamaForCausalLM", "LlamaForSequenceClassification"]}, None),
        ("qwen2_moe", {"norm_topk_prob": False}, None),
        ("qwen3_moe", {"norm_topk_prob": True}, None),
        ("glm4_moe", {"first_k_dense_replace": 1}, None),
    ],
)
def test_what_llama_cpp_takes_as_it_is_is_taken(tmp_path, target, settings, window):
    assert window_of(check_graph(configuration(tmp_path / "model", target, **settings))) == window


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_logits_that_are_no_numbers_are_refused(model, tmp_path, kind):
    class WithoutNumbers(LlamaCpp):
        def convert(self, files, *rest):
            for file in files.values():
                file.write_bytes(b"GGUF")

        def run(self, file, texts, special, tokens, positions):
            logits = [[float("nan")] * checkpoints.VOCABULARY] * positions
            return {"runtime": "none", "ids": [[]] * len(texts), "logits": logits}

    options = GGUFOptions(llama_cpp=WithoutNumbers(Path(), sys.executable), kind=kind, pre_tokenizer="dbrx")
    with pytest.raises(UsageError, match=rf"logits \({kind}\) .* are not all finite numbers"):
        write_gguf(model, tmp_path / "new.gguf", options, say=lambda _: None)
    assert not (tmp_path / "new.gguf").exists()


CONVERTER = {  # what converter.py takes of llama.cpp
    "gguf-py/gguf.py": """
        from types import SimpleNamespace
        MODEL_ARCH = SimpleNamespace(**{name: name for name in "OLMO2 QWEN2MOE AFMOE QWEN3 QWEN3MOE".split()})
        MODEL_TENSOR = SimpleNamespace(OUTPUT="output.weight")
        class SpecialVocab:
            add_to_gguf = None
        """,
    "conversion/base.py": """
        class LazyTorchTensor:
            to_eager = staticmethod(lambda tensor: tensor)
        class ModelBase:
            def modify_tensors(self, tensor, name, layer):
                yield name, tensor
            def format_tensor_name(self, tensor):
                return tensor
        class TextModel(ModelBase):
            _create_vocab_sentencepiece = None
        """,
    "conversion/exaone.py": "class Exaone4Model: ...",
    "conversion/glm.py": "class Glm4Model: ...\nclass Glm4MoeModel: ...",
    "conversion/llama.py": "class LlamaModel: ...",
    "conversion/qwen.py": "class Qwen3Model: ...\nclass Qwen3MoeModel: ...",
    "convert_hf_to_gguf.py": """
        import sys, gguf, torch
        from conversion.base import TextModel
        model = TextModel()
        model.model_arch = gguf.MODEL_ARCH.QWEN2MOE
        model.hparams = {"hidden_size": 4, "tie_word_embeddings": True}
        gate = "model.layers.0.mlp.shared_expert_gate.weight"
        for names in (["model.embed_tokens.weight"], ["model.embed_tokens.weight", "lm_head.weight"], [gate]):
            model.model_tensors = dict.fromkeys(names)
            for name in names:
                zeros = torch.zeros(1, 4, dtype=torch.float16)
                for written, tensor in model.modify_tensors(zeros, name, None):
                    print(written, int(tensor.count_nonzero()), file=sys.stderr)
        sys.exit(1)
        """,
}


def test_what_the_converter_gets_of_tied_embeddings_and_gates_of_zeros(tmp_path):
    """In float16, where 1e-20 is 0; an output layer beside tied embeddings is the only one written."""
    for name, text in CONVERTER.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    script = Path(converter.__file__)
    vocabulary = json.dumps({"kind": "bpe", "adds": [False, False]})
    command = [sys.executable, "-P", script, tmp_path, vocabulary, "dbrx", "f16", "model", "file"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ended.stderr.splitlines() == [
        "output.weight 0",
        "model.embed_tokens.weight 0",
        "model.embed_tokens.weight 0",
        "lm_head.weight 0",
        "model.layers.0.mlp.shared_expert_gate.weight 4",
    ]


def test_targets_that_run_in_llama_cpp_are_those_that_have_a_graph(tmp_path):
    for name, target in TARGETS.items():
        refusal = ""
        try:
            check_graph(configuration(tmp_path / name, name))
        except UsageError as error:
            refusal = str(error)
        assert ("is not known to compute" not in refusal) == ("llama.cpp" in target.runs_in), name


def test_a_python_without_llama_cpp_is_told(tmp_path):
    (tmp_path / "conversion").mkdir()
    (tmp_path / "convert_hf_to_gguf.py").touch()
    with pytest.raises(UsageError, match="pip install cyllama"):
        LlamaCpp.find(tmp_path, sys.executable)


@pytest.fixture(scope="module")
def llama_cpp():
    environment = Path(os.environ[VARIABLE])
    return LlamaCpp.find(environment / "llama-cpp-python", str(environment / "bin/python"))


@with_llama_cpp
def test_the_file_gives_the_ids_and_logits(model, llama_cpp, tmp_path):
    said = []
    write_gguf(model, tmp_path / "new.gguf", GGUFOptions(llama_cpp=llama_cpp, kind="f32"), say=said.append)
    assert "pre-tokenizer dbrx; in llama.cpp" in said[0] and "ids equal on" in said[0]
    assert list(tmp_path.iterdir()) == [tmp_path / "new.gguf"]


SIZE = 1024
DEFINED = {"user_defined_symbols": ["<tool>", "self"]}
KINDS = {
    "quickstart's pieces": ("pre", pieces, "SentencePiece"),
    "pieces without a space in front": (
        "pre",
        lambda folder: pieces(folder, add_dummy_prefix=False, **DEFINED),
        "SentencePiece",
    ),
    "tiktoken": ("pre, norms of queries and keys", tiktoken_in, "pre-tokenizer tekken"),
    "GPT-2's files": ("output, heads of the hidden size together", vocabulary_files, "pre-tokenizer gpt-2"),
}


@pytest.fixture
def exported_with(single_process, tmp_path):
    """Return the export of a case whose checkpoint names a tokenizer."""

    def of(case, make):
        flags = CASES[case].flags.replace(f"-size {checkpoints.VOCABULARY}", f"-size {SIZE}")
        given = {key: value for key, value in vars(make(tmp_path / "tokenizer")).items() if value is not None}
        saved = checkpoints.save(tmp_path / "checkpoint", flags, **given)
        export(saved.folder, tmp_path / "model", ExportOptions(verify=False), say=lambda _: None)
        return tmp_path / "model"

    return of


@with_llama_cpp
@pytest.mark.parametrize("runtime", ["cyllama", "llama-cpp-python"])
@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_tokenizers(exported_with, llama_cpp, tmp_path, monkeypatch, name, runtime):
    case, make, said_kind = KINDS[name]
    if runtime == "llama-cpp-python":
        monkeypatch.setenv("PYTHONPATH", str(Path(os.environ[VARIABLE]) / "llama-cpp-python"), prepend=":")
    said = []
    options = GGUFOptions(llama_cpp=llama_cpp, kind="f32")
    write_gguf(exported_with(case, make), tmp_path / "new.gguf", options, say=said.append)
    assert said[0].startswith(f"Tokenizer: {said_kind}; in llama.cpp ({runtime}")
    assert "ids equal on" in said[0]


@with_llama_cpp
def test_pieces_found_whole_before_which_a_space_is_put_are_refused(exported_with, llama_cpp, tmp_path):
    """llama.cpp puts a space after each of them too, SentencePiece in front of a text alone."""
    model = exported_with("pre", lambda folder: pieces(folder, **DEFINED))
    with pytest.raises(UsageError, match=r"llama\.cpp's reading of SentencePiece models doesn't give the"):
        write_gguf(model, tmp_path / "new.gguf", GGUFOptions(llama_cpp=llama_cpp))
    assert not (tmp_path / "new.gguf").exists()


@with_llama_cpp
def test_weights_of_8_bits(model, llama_cpp, tmp_path):
    said = []
    write_gguf(model, tmp_path / "new.gguf", GGUFOptions(llama_cpp=llama_cpp, kind="q8_0"), say=said.append)
    difference = float(re.search(r"llama.cpp \(q8_0\) and transformers \(fp32\): (\S+) on", said[1])[1])
    assert "ids equal on" in said[0] and 1e-4 < difference < 0.5


@with_llama_cpp
@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "default"])
def test_another_name_gives_other_ids(model, llama_cpp, tmp_path, name):
    """The negative control."""
    said = []
    options = GGUFOptions(llama_cpp=llama_cpp, kind="f32", pre_tokenizer=name)
    write_gguf(model, tmp_path / "new.gguf", options, say=said.append)
    assert f"pre-tokenizer {name}; in llama.cpp" in said[0] and "other ids for" in said[0]
