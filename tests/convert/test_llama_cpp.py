"""Exports are converted to GGUF by llama.cpp's own converter, and computed by llama.cpp as by Megatron."""

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.gguf.graphs import check_graph
from megatron_periln.convert.gguf.processes import LlamaCpp, Vocabulary
from megatron_periln.convert.parity_check import compare_logits
from megatron_periln.convert.targets import TARGETS
from megatron_periln.errors import UsageError
from tests.convert import checkpoints
from tests.convert.cases import CASES, Case
from tests.convert.checkpoints import COMMON, EXPERTS, MUP, UNTIED

VARIABLE = "MEGATRON_PERILN_LLAMA_CPP"
WHOLE = COMMON.replace("--kv-channels 24", "")
SIGMOID = EXPERTS + " --moe-router-score-function sigmoid"
# What llama.cpp takes for granted of some architectures, and none of the other cases has.
ITS_OWN = {
    "peri, gate, windows in three of four layers, experts, tied": Case(
        COMMON.replace("--num-layers 3", "--num-layers 5")
        + "--norm-placement peri --qk-layernorm --attention-output-gate --window-size 8,0"
        " --window-attn-skip-freq 4 --no-rope-freq [0,0,0,1,0] --moe-layer-freq [0,1,1,1,1]"
        " --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 1.7" + SIGMOID,
        "afmoe",
    ),
    "peri, interpolated positions, experts, shared": Case(
        COMMON + UNTIED + "--norm-placement peri --qk-layernorm --rotary-seq-len-interpolation-factor 4"
        " --moe-shared-expert-intermediate-size 96" + SIGMOID,
        "afmoe",
    ),
    "pre, experts before softmax, shared, tied, scales": Case(
        WHOLE + MUP + "--norm-placement pre --add-qkv-bias --moe-router-pre-softmax"
        " --moe-shared-expert-intermediate-size 72 --moe-shared-expert-gate" + EXPERTS,
        "qwen2_moe",
    ),
    "pre, experts before softmax": Case(
        WHOLE + UNTIED + "--norm-placement pre --moe-router-pre-softmax"
        " --moe-shared-expert-intermediate-size 72" + EXPERTS,
        "qwen2_moe",
    ),
    "pre, norms and biases of queries and keys, experts": Case(
        COMMON + "--norm-placement pre --qk-layernorm --add-qkv-bias" + EXPERTS, "qwen3_moe"
    ),
    "pre, norms and biases of queries and keys": Case(
        COMMON + UNTIED + "--norm-placement pre --qk-layernorm --add-qkv-bias", "qwen3"
    ),
    "pre, experts, scaled rotary": Case(
        COMMON + UNTIED + "--norm-placement pre --use-rope-scaling --rotary-base 500000" + EXPERTS, "mixtral"
    ),
    "output, whole queries, tied, YaRN": Case(
        WHOLE.replace("type rope", "type yarn")
        + "--norm-placement output --qk-layernorm --whole-qk-norm --rotary-scaling-factor 4",
        "olmo2",
    ),
    "output, whole queries, windows everywhere": Case(
        WHOLE + "--norm-placement output --qk-layernorm --whole-qk-norm --window-size 8,0", "olmo3"
    ),
    "output, windows in 64 layers": Case(
        WHOLE.replace("--num-layers 3", "--num-layers 64") + UNTIED + "--norm-placement output --qk-layernorm"
        " --window-size 8,0 --window-attn-skip-freq 4 --no-rope-freq "
        + str([0, 0, 0, 1] * 16).replace(" ", ""),
        "exaone4",
    ),
}
ALL = CASES | ITS_OWN
# What it takes otherwise.
REFUSED = {
    "output": "heads to be of the hidden size together",
    "output, tied, zero-centered": "heads to be of the hidden size together",
    "output, windows": "heads to be of the hidden size together",
    "peri, gate, windows, experts": "every fourth layer of an AFMoE",
    "pre, norms of queries and keys, experts before softmax": "norm_topk_prob to be True",
    "pre, norms of queries and keys, experts": "every layer to have experts",
    "pre, experts, shared without a gate": "norm_topk_prob to be False",
    "pre, experts, shared, dense layers": "every layer to have experts",
}
NAMES = [
    name for name, case in ALL.items() if "llama.cpp" in TARGETS[case.target].runs_in and name not in REFUSED
]
ONE_PER_TARGET = list({ALL[name].target: name for name in reversed(NAMES)}.values())
CONTROL = "peri, another base of rotation"
COUNT = 24
ROWS = 8  # of two, small mixtures continue both by one token

pytestmark = pytest.mark.skipif(
    VARIABLE not in os.environ, reason=f"{VARIABLE} names no folder that make test-llama-cpp has made"
)


@pytest.fixture(scope="module")
def checkpoint(saved, tmp_path_factory):
    """Return the checkpoint of a case, also of those of this module."""

    @functools.cache
    def of(name):
        if name in CASES:
            return saved(name)
        return checkpoints.save(tmp_path_factory.mktemp("checkpoint"), ITS_OWN[name].flags)

    return of


@pytest.fixture(scope="module")
def computed(checkpoint, byte_tokenizer, tmp_path_factory):
    """What llama.cpp computes for every export: logits, and 24 greedy tokens."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    np.save(folder / "tokens.npy", checkpoints.sample(ROWS).numpy())
    folders = {name: folder / str(number) for number, name in enumerate([*NAMES, CONTROL])}
    for name in NAMES:
        options = ExportOptions(target=ALL[name].target, tokenizer=byte_tokenizer, verify=False)
        export(checkpoint(name).folder, folders[name], options, say=lambda _: None)
    shutil.copytree(folders["peri"], folders[CONTROL])
    config = json.loads((folders[CONTROL] / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 10000.0
    (folders[CONTROL] / "config.json").write_text(json.dumps(config))
    environment = Path(os.environ[VARIABLE])
    llama_cpp = LlamaCpp.find(environment / "llama-cpp-python", str(environment / "bin/python"))
    files = {each: Path(f"{each}.gguf") for each in folders.values()}
    llama_cpp.convert(files, Vocabulary("bpe", (False, False), True), "gpt-2", "f32")
    script = Path(__file__).with_name("logits_with_llama_cpp.py")
    command = [environment / "bin/python", script, environment / "llama-cpp-python"]
    command += [folder / "tokens.npy", COUNT]
    pairs = [path for each, file in files.items() for path in (file, f"{each}.npz")]
    subprocess.run(list(map(str, [*command, *pairs])), check=True)
    return {name: np.load(f"{each}.npz") for name, each in folders.items()}


def difference(computed, checkpoint, name, model):
    return compare_logits(
        torch.from_numpy(computed[name]["logits"]), checkpoint(model).logits(checkpoints.sample(ROWS))
    )


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_megatrons(checkpoint, computed, name):
    limit = 1e-4 if "64 layers" in name else 2e-5  # rounding adds up from layer to layer
    assert difference(computed, checkpoint, name, name).maximum <= limit


@pytest.mark.parametrize("name", ONE_PER_TARGET)
def test_greedy_generation_with_a_cache_is_megatrons_argmax(checkpoint, computed, name):
    expected = checkpoints.greedy(checkpoint(name).logits, checkpoints.sample(ROWS), COUNT)
    assert len(expected.unique()) > 2
    assert torch.equal(torch.from_numpy(computed[name]["continued"]), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_takes_otherwise_is_refused(exported, name):
    with pytest.raises(UsageError, match=REFUSED[name]):
        check_graph(exported(name)[0])


def test_another_configuration_computes_something_else(checkpoint, computed):
    assert difference(computed, checkpoint, CONTROL, "peri").maximum > 0.1
