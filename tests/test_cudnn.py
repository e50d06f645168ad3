"""A cuDNN that is too old for what Transformer Engine's library asks of it."""

import importlib.metadata
import os
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import AttnBackend
from packaging.requirements import Requirement

from megatron_periln import cudnn
from tests import engine_library


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """Install a Transformer Engine beside a cuDNN; return what does not fit."""
    monkeypatch.syspath_prepend(tmp_path)

    def find(running, **engine):
        engine_library.install(tmp_path, **engine)
        monkeypatch.setattr(cudnn, "running_cudnn", lambda: running)
        return cudnn.find_cudnn_mismatch()

    return find


@pytest.mark.parametrize(("constants", "least"), [(engine_library.RESHAPE_MODE, 92200), (b"another", 0)])
def test_the_library_tells_by_its_constants(tmp_path, constants, least):
    library = tmp_path / "libtransformer_engine.so"
    library.write_bytes(engine_library.elf(constants))
    assert cudnn.least_cudnn(library) == least


@pytest.mark.parametrize("content", [b"", b"\x7fELF\x01" + bytes(80), b"no library at all" * 9])
def test_what_is_no_library_tells_nothing(tmp_path, content):
    (library := tmp_path / "libtransformer_engine.so").write_bytes(content)
    assert cudnn.least_cudnn(library) is None


@pytest.mark.parametrize("running", [91900, 92108])
def test_both_versions_and_what_to_install_are_named(beside, running):
    mismatch = beside(running)
    version = cudnn.dotted(running)
    assert mismatch.what == (
        "Transformer Engine 2.17.1 needs cuDNN 9.22.0 or newer for the backward pass of its fused attention, "
        f"and here is cuDNN {version}"
    )
    assert mismatch.remedy.startswith(("pip install 'nvidia-cudnn-cu13>=9.22'", "raise this installation's"))
    assert "transformer-engine before 2.17" in mismatch.remedy


@pytest.mark.parametrize(
    ("running", "engine"),
    [(92200, {}), (92600, {}), (91900, {"sets_reshape_mode": False, "version": "2.16.1"}), (None, {})],
)
def test_what_fits(beside, running, engine):
    assert beside(running, **engine) is None


@pytest.mark.parametrize("backend", [backend.name for backend in AttnBackend])
def test_upstream_still_sets_the_same_environment(monkeypatch, backend):
    names = [f"NVTE_{name}_ATTN" for name in ("FLASH", "FUSED", "UNFUSED")]
    for name in names:
        monkeypatch.setenv(name, "")  # and back to what it was
        monkeypatch.delenv(name)
    cudnn.choose_attention(backend)
    mine = {name: os.environ.pop(name) for name in names}
    config = Namespace(attention_backend=AttnBackend[backend], flash_attention_version=None)
    LanguageModule._set_attention_backend(Namespace(config=config))
    assert {name: os.environ[name] for name in names} == mine


def test_what_the_environment_says_stays(monkeypatch):
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    cudnn.choose_attention("auto")
    assert os.environ["NVTE_FUSED_ATTN"] == "0"


def test_without_transformer_engine(monkeypatch):
    monkeypatch.setattr(cudnn.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(cudnn, "running_cudnn", lambda: 91900)
    assert cudnn.find_cudnn_mismatch() is None


ROOT = Path(__file__).parents[1]


def test_the_pinned_set_fits():
    """Which torch requires one cuDNN, and the extra one that Transformer Engine works with."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.partition(" ;")[0].split("==") for line in lines)
    (torchs,) = (
        requirement.specifier
        for requirement in map(Requirement, importlib.metadata.requires("torch"))
        if requirement.name == "nvidia-cudnn-cu13"
    )
    assert torchs.contains(pins["nvidia-cudnn-cu13"])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, cudnn_package in (("te", "nvidia-cudnn-cu13"), ("te-cu12", "nvidia-cudnn-cu12")):
        asked = {requirement.name: requirement.specifier for requirement in map(Requirement, extras[extra])}
        assert not asked[cudnn_package].contains("9.21.1") and asked[cudnn_package].contains("9.22.0")
        assert asked["transformer-engine"].contains(pins["transformer-engine"])
    assert asked[cudnn_package].contains(pins["nvidia-cudnn-cu13"])
    assert len({pins[f"transformer-engine{part}"] for part in ("", "-cu13", "-torch")}) == 1
