"""Which backend is chosen, why, and that the norm modules follow it."""

import logging

import pytest
import torch

from megatron_periln.norms import PERI, OutputNorm, kernels
from megatron_periln.norms.kernels import backends, reference
from tests.norms import formulas
from tests.norms.test_modules import config


@pytest.fixture(autouse=True)
def forget():
    """Choose anew in each test, and leave nothing chosen."""
    kernels.choose_backend.cache_clear()
    yield
    kernels.use_backend("auto")
    kernels.choose_backend.cache_clear()


def choose(name="auto", device_type="cuda", hidden_size=1024):
    choice = kernels.choose_backend(name, device_type, hidden_size)
    return choice.backend.name, choice.reason


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is new enough."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def test_auto_takes_plain_torch_on_the_cpu_even_where_triton_is_interpreted():
    name, reason = choose(device_type="cpu")
    assert (name, reason) == ("torch", "there are no fused kernels for the CPU")
    assert kernels.choose_backend("auto", "cpu", 8).backend.norm_add is reference.norm_add


def test_auto_takes_the_fused_kernels_on_a_gpu(gpu):
    assert choose() == ("triton", "bias, norm, dropout and residual add are one kernel")


def test_auto_takes_torch_compile_where_the_kernels_can_not_serve(gpu, monkeypatch):
    assert choose(hidden_size=16385) == (
        "compile",
        "hidden size 16385 is beyond the 16384 of Triton's kernels",
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert choose() == ("compile", "the GPU is older than compute capability 8.0")


def test_auto_takes_plain_torch_without_triton(gpu, monkeypatch):
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert choose() == ("torch", "Triton is not installed")


@pytest.mark.parametrize("name", ["triton", "compile", "torch"])
def test_what_is_asked_for_is_taken(gpu, name):
    assert choose(name) == (name, "as asked for")


@pytest.mark.parametrize(
    ("name", "hidden_size", "words"),
    [
        ("triton", 1024, ["'triton'", "Triton is not installed", "choose auto"]),
        ("compile", 1024, ["'compile'", "needs Triton", "choose auto"]),
    ],
)
def test_without_triton_what_needs_it_is_refused(gpu, monkeypatch, name, hidden_size, words):
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(ValueError) as error:
        choose(name, hidden_size=hidden_size)
    assert all(word in str(error.value) for word in words)


def test_a_hidden_size_beyond_the_kernels_is_refused(gpu):
    with pytest.raises(
        ValueError, match="hidden size 16385 is beyond the 16384 of Triton's kernels; choose auto"
    ):
        choose("triton", hidden_size=16385)


def test_an_unknown_backend_is_refused():
    with pytest.raises(
        ValueError, match="unknown norm backend 'cuda'; choose from auto, triton, compile, torch"
    ):
        kernels.use_backend("cuda")


def test_the_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        for _ in range(3):
            kernels.norm(torch.ones(2, 8), torch.ones(8), None, 1e-5, False)
    (record,) = caplog.records
    assert record.getMessage() == (
        "norm backend for hidden size 8 on cpu: torch (there are no fused kernels for the CPU)"
    )


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_modules_follow_the_backend(name, monkeypatch):
    calls = []
    backend = kernels.choose_backend(name, "cpu", 48).backend
    monkeypatch.setattr(
        backends, "choose_backend", lambda *asked: calls.append(asked) or backends.BackendChoice(backend, "")
    )
    kernels.use_backend(name)
    norm = OutputNorm(config(), PERI)
    sublayer_output, sublayer_bias, residual, _, _ = formulas.inputs()
    out = norm(sublayer_output, sublayer_bias, residual, 0.0, True)
    assert calls == [(name, "cpu", 48)]
    torch.testing.assert_close(
        out, formulas.norm_add(sublayer_output, sublayer_bias, residual, norm.weight, None, 1e-5).float()
    )


def test_on_the_cpu_triton_needs_its_interpreter(compiled_on_the_cpu):
    error = compiled_on_the_cpu["refusal"]
    assert error.startswith("norm backend 'triton': Triton's kernels need a GPU, or TRITON_INTERPRET=1")
    assert error.endswith("choose auto")


def test_the_reference_compiles_as_one_graph(compiled_on_the_cpu):
    differences = compiled_on_the_cpu["differences"]
    assert len(differences) == 2
    assert max(differences) < 1e-5
