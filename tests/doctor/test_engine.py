"""Transformer Engine's layers on a GPU: what fails forward or backward, or is off, has a row."""

import os
import re
import sys

import pytest
import torch

from megatron_periln.doctor import probe
from megatron_periln.doctor.engine import Wanted, find_failure
from tests import engine_library
from tests.doctor import stand_in_engine


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("", Wanted()),
        ("--num-layers 2", Wanted("float32", layer_norm=True)),
        ("--bf16 --normalization RMSNorm", Wanted("bfloat16")),
        ("--fp16 --normalization RMSNorm", Wanted("float16")),
        ("--bf16 --fp8-format hybrid", Wanted("bfloat16", "delayed", layer_norm=True)),
        ("--bf16 --fp8-format e4m3 --fp8-recipe blockwise", Wanted("bfloat16", "blockwise", layer_norm=True)),
        ("--bf16 --transformer-impl local", Wanted("bfloat16", layer_norm=True, local=True)),
        ("--attention-backend unfused", Wanted(attention="unfused")),
        ("--bf16 --attention-backend local", Wanted("bfloat16", layer_norm=True, attention="local")),
    ],
)
def test_the_flags_say_what_is_wanted(flags, wanted):
    assert Wanted.by(flags.split()) == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_what_works(monkeypatch, dtype, layer_norm):
    asked = stand_in_engine.install(monkeypatch)
    assert find_failure(Wanted(dtype, layer_norm=layer_norm), "cpu") is None
    assert asked == []


def test_the_linears_run_in_the_recipe_of_the_flags(monkeypatch):
    for recipe, name in {"delayed": "DelayedScaling", "blockwise": "Float8BlockScaling"}.items():
        asked = stand_in_engine.install(monkeypatch)
        assert find_failure(Wanted(recipe=recipe), "cpu") is None
        assert asked == [name, name]


def test_attention_that_goes_forward_only(monkeypatch):
    """As Transformer Engine 2.17's does beside cuDNN 9.19: the doctor had said that all was well."""
    stand_in_engine.install(monkeypatch, fails=True)
    failure = find_failure(Wanted(), "cpu")
    assert failure.startswith("attention, bfloat16: RuntimeError: ")
    assert "CUDNN_ATTR_OPERATION_RESHAPE_MODE" in failure


@pytest.mark.parametrize(("backend", "fails"), [("auto", True), ("fused", True), ("unfused", False)])
def test_attention_is_that_of_the_flags(monkeypatch, backend, fails):
    """What does without cuDNN is one of the remedies that are told of."""
    stand_in_engine.install(monkeypatch, fails=True)
    assert (find_failure(Wanted(attention=backend), "cpu") is not None) == fails


def test_megatrons_own_attention_needs_none(monkeypatch):
    stand_in_engine.install(monkeypatch)
    monkeypatch.delattr(stand_in_engine.DotProductAttention, "forward")
    assert find_failure(Wanted(attention="local"), "cpu") is None


def test_a_linear_that_is_off(monkeypatch):
    """By a tenth, give or take what bfloat16 products of another processor round otherwise."""
    stand_in_engine.install(monkeypatch, off=0.1)
    told = re.fullmatch(r"linear, bfloat16: (\d+\.\d)% off plain torch", find_failure(Wanted(), "cpu"))
    assert float(told[1]) == pytest.approx(10, abs=1.5)


@pytest.fixture
def two_gpus(monkeypatch):
    """Whose work the CPU does; return those that were used."""
    used = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    from megatron_periln.doctor import engine

    find = engine.find_failure
    monkeypatch.setattr(engine, "find_failure", lambda wanted, _: find(wanted, "cpu"))
    return used


def test_every_gpu_is_tried(monkeypatch, two_gpus):
    stand_in_engine.install(monkeypatch)
    answer = probe.STEPS["attention, norm, linear"](["--bf16"])
    assert answer == {"version": "forward and backward on 2 GPUs, bfloat16"}
    assert two_gpus == [0, 1]


def test_the_cause_has_its_mend(monkeypatch, two_gpus, tmp_path, doctor, found):
    from megatron_periln import cudnn

    stand_in_engine.install(monkeypatch, fails=True)
    engine_library.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cudnn, "running_cudnn", lambda: 91900)
    monkeypatch.setattr(
        cudnn,
        "transformer_engine_library",
        lambda: tmp_path / "transformer_engine/wheel_lib/libtransformer_engine.so",
    )
    for name in probe.OF_TRANSFORMER_ENGINE:
        found[name] = probe.STEPS[name]([])
    code, rows, lines = doctor()
    assert code == 1
    assert rows["cuDNN"][0][0] == "warning"
    ((status, value),) = rows["attention, norm, linear"]
    assert status == "failed" and value.startswith("GPU 0: attention, bfloat16: RuntimeError")
    (line,) = [line for line in lines if "attention, norm, linear" in line]
    assert "Transformer Engine 2.17.1 needs cuDNN 9.22.0 or newer" in line and "cuDNN 9.19.0" in line
    assert ">=9.22'" in line or "cuDNN to 9.22" in line


def test_megatrons_own_layers_need_none_of_it(monkeypatch, two_gpus):
    stand_in_engine.install(monkeypatch, fails=True)
    answer = probe.STEPS["attention, norm, linear"](["--transformer-impl", "local"])
    assert answer == {"version": "not taken: --transformer-impl local"}


def test_without_transformer_engine_there_are_no_rows_of_it(doctor, found):
    found["Transformer Engine"] = {"error": "ModuleNotFoundError: No module named 'x'", "missing": True}
    for name in probe.OF_TRANSFORMER_ENGINE:
        found.pop(name)
    assert not set(probe.OF_TRANSFORMER_ENGINE) & set(doctor()[1])


def test_an_engine_that_kills_its_process(tmp_path, monkeypatch):
    """Not an import that came to an end."""
    from megatron_periln.doctor import software
    from megatron_periln.doctor.options import parse

    program = (
        'print(\'{"starts": "attention, norm, linear"}\', flush=True); import os; os.kill(os.getpid(), 11)'
    )
    monkeypatch.setattr(software, "run_within", _runs(program))
    answers = software.probe(parse(["--timeout", "60"]))
    assert answers["attention, norm, linear"]["error"] == "it came to SIGSEGV"


def _runs(program):
    from megatron_periln.doctor.timeouts import run_within

    return lambda _, seconds: run_within([sys.executable, "-c", program], seconds, env=dict(os.environ))
