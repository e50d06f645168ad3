"""Exports are computed by transformers 4 as by transformers 5."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_periln.convert.parity_check import compare_logits
from tests.convert import checkpoints
from tests.convert.cases import CASES

VARIABLE = "MEGATRON_PERILN_TRANSFORMERS_4"
# Those that transformers 4.57 has.
CLASSES = {
    "glm4",
    "llama",
    "qwen3",
    "exaone4",
    "minimax",
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "glm4_moe",
    "olmo2",
    "olmo3",
}
NAMES = [name for name, case in CASES.items() if case.target in CLASSES]

pytestmark = pytest.mark.skipif(
    VARIABLE not in os.environ, reason=f"{VARIABLE} does not name a Python that has transformers 4"
)


@pytest.fixture(scope="module")
def logits(exported, tmp_path_factory):
    """The logits that transformers 4 computes for every export."""
    folder = tmp_path_factory.mktemp("transformers-4")
    np.save(folder / "tokens.npy", checkpoints.sample().numpy())
    outputs = {name: folder / f"{number}.npy" for number, name in enumerate(NAMES)}
    pairs = [str(path) for name in NAMES for path in (exported(name)[0], outputs[name])]
    script = Path(__file__).with_name("logits_with_transformers.py")
    subprocess.run([os.environ[VARIABLE], str(script), str(folder / "tokens.npy"), *pairs], check=True)
    return {name: torch.from_numpy(np.load(path)) for name, path in outputs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_megatrons(saved, logits, name):
    assert compare_logits(logits[name], saved(name).logits(checkpoints.sample())).maximum <= 1e-5
