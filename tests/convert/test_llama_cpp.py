"""Exports are converted to GGUF by llama.cpp's own converter, and computed by llama.cpp as by Megatron."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.parity_check import compare_logits
from megatron_periln.convert.targets import TARGETS
from tests.convert import checkpoints
from tests.convert.cases import CASES

VARIABLE = "MEGATRON_PERILN_LLAMA_CPP"
# llama.cpp's exaone4 takes the heads to be of the hidden size together; its other graphs don't.
NAMES = [
    name
    for name, case in CASES.items()
    if "llama.cpp" in TARGETS[case.target].runs_in
    and (case.target != "exaone4" or "--kv-channels" not in case.flags)
]
ONE_PER_TARGET = list({CASES[name].target: name for name in reversed(NAMES)}.values())
CONTROL = "peri, another base of rotation"
COUNT = 24

pytestmark = pytest.mark.skipif(
    VARIABLE not in os.environ, reason=f"{VARIABLE} names no folder that make test-llama-cpp has made"
)


@pytest.fixture(scope="module")
def computed(saved, byte_tokenizer, tmp_path_factory):
    """What llama.cpp computes for every export: logits, and 24 greedy tokens."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    np.save(folder / "tokens.npy", checkpoints.sample().numpy())
    folders = {name: folder / str(number) for number, name in enumerate([*NAMES, CONTROL])}
    for name in NAMES:
        options = ExportOptions(tokenizer=byte_tokenizer, verify=False)
        export(saved(name).folder, folders[name], options, say=lambda _: None)
    shutil.copytree(folders["peri"], folders[CONTROL])
    config = json.loads((folders[CONTROL] / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 10000.0
    (folders[CONTROL] / "config.json").write_text(json.dumps(config))
    environment = Path(os.environ[VARIABLE])
    script = Path(__file__).with_name("logits_with_llama_cpp.py")
    command = [
        environment / "bin/python",
        script,
        environment / "llama-cpp-python",
        folder / "tokens.npy",
        COUNT,
    ]
    pairs = [path for each in folders.values() for path in (each, f"{each}.npz")]
    subprocess.run(list(map(str, [*command, *pairs])), check=True)
    return {name: np.load(f"{each}.npz") for name, each in folders.items()}


def difference(computed, saved, name, model):
    return compare_logits(
        torch.from_numpy(computed[name]["logits"]), saved(model).logits(checkpoints.sample())
    )


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_megatrons(saved, computed, name):
    assert difference(computed, saved, name, name).maximum <= 1e-5


@pytest.mark.parametrize("name", ONE_PER_TARGET)
def test_greedy_generation_with_a_cache_is_megatrons_argmax(saved, computed, name):
    expected = checkpoints.greedy(saved(name).logits, checkpoints.sample(), COUNT)
    assert len(expected.unique()) > 2
    assert torch.equal(torch.from_numpy(computed[name]["continued"]), expected)


def test_another_configuration_computes_something_else(saved, computed):
    assert difference(computed, saved, CONTROL, "peri").maximum > 0.1
