"""Layers with their norms placed can be CUDA graphs: replayed without Python, they compute what they should.

On a stand-in for graphs on the CPU; tests/gpu has real ones.
"""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch import nn

from megatron_periln.norms import kernels
from tests.models import small
from tests.models.graph_stand_in import Graph, HostWaitsError

pytestmark = pytest.mark.usefixtures("single_process")

BATCH = 2


@pytest.fixture(autouse=True)
def one_generator(monkeypatch):
    """Draw all numbers from one generator: going from one to another, the host compares its own's state."""
    monkeypatch.setattr(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())


@dataclass
class Captured:
    """A layer's forward and backward pass as a graph, as Megatron captures it."""

    layer: nn.Module
    seed: int = 3

    def __post_init__(self):
        self.stream = torch.zeros(small.SEQUENCE, BATCH, small.HIDDEN, requires_grad=True)
        self.grad = torch.zeros_like(self.stream)
        self.parameters = list(self.layer.parameters())
        self.layer(self.stream, None)  # a step that is not captured comes first
        with Graph() as self.graph:
            self.results = passes(self.layer, self.stream, self.grad)

    def replay(self, stream, grad):
        with torch.no_grad():
            self.stream.copy_(stream)
            self.grad.copy_(grad)
        torch.manual_seed(self.seed)
        self.graph.replay()
        return self.results


def passes(layer, stream, grad):
    out, _ = layer(stream, None)
    inputs = [stream, *layer.parameters()]
    return [out, *torch.autograd.grad(out, inputs, grad, allow_unused=True)]


def replays_equal_steps(layer):
    """Replay a layer's graph on other values, twice, and compare with a step of the layer."""
    captured = Captured(layer)
    generator = torch.Generator().manual_seed(1)
    equal = []
    for _ in range(2):
        stream, grad = (torch.randn(captured.stream.shape, generator=generator) for _ in range(2))
        replayed = [None if t is None else t.clone() for t in captured.replay(stream, grad)]
        torch.manual_seed(captured.seed)
        expected = passes(layer, stream.requires_grad_(), grad)
        assert all(t is None or t.isfinite().all() for t in expected)
        equal.append(
            all(
                one is other or torch.equal(one, other) for one, other in zip(replayed, expected, strict=True)
            )
        )
    return all(equal)


def layer_of(placement, *, fuse=False, **changes):
    transformer = small.transformer_config(**changes)
    options = {"fuse_pre_mlp_norm": True} if fuse else {}
    return small.perturb(small.build(placement, transformer, **options)).decoder.layers[1]


ALL = {"normalization": "LayerNorm", "add_bias_linear": True, "hidden_dropout": 0.2, "attention_dropout": 0.1}


@pytest.mark.parametrize("placement", small.PLACEMENTS)
@pytest.mark.parametrize("changes", [{}, ALL], ids=["RMSNorm", "all"])
def test_a_replay_computes_what_a_step_does(placement, changes):
    assert replays_equal_steps(layer_of(placement, **changes))


@pytest.mark.parametrize("changes", [{}, ALL], ids=["RMSNorm", "all"])
def test_a_replay_computes_the_fused_norm(changes):
    layer = layer_of("peri", fuse=True, **changes)
    assert replays_equal_steps(layer)
    assert layer.pre_mlp_layernorm._sum_and_normed is None  # nothing of the graph's memory is kept


@pytest.mark.parametrize("module", ["core_attn", "mlp"])
def test_upstream_still_cannot_capture_what_is_recomputed_by_checkpoints(module):
    # Which is why training/graph_checks.py refuses it.
    layer = layer_of("pre", recompute_granularity="selective", recompute_modules=[module])
    stream = torch.zeros(small.SEQUENCE, BATCH, small.HIDDEN, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"not compatible with \.grad\(\)"):
        passes(layer, stream, torch.ones_like(stream))


@pytest.mark.parametrize("backend", ["torch", "compile"])
def test_no_backend_has_the_host_wait(backend, monkeypatch):
    # With a compiler of torch.compile that leaves operations as they are, or there would be none to see.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(kernels.backends, "_requested", "torch" if backend == "torch" else "compile")
    kernels.backends._compiled.cache_clear()
    kernels.choose_backend.cache_clear()
    try:
        assert replays_equal_steps(layer_of("peri", hidden_dropout=0.2))
        assert replays_equal_steps(layer_of("post", hidden_dropout=0.2))
        assert replays_equal_steps(layer_of("gated-peri", hidden_dropout=0.2))
    finally:
        kernels.backends._compiled.cache_clear()
        kernels.choose_backend.cache_clear()


class CountingCalls(nn.Module):
    """Scales by how often Python called it, which a replay doesn't do."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Waiting(nn.Module):
    """Has the host wait for a value."""

    def forward(self, x):
        return x * x.amax().item()


@pytest.mark.parametrize("mistake", [CountingCalls, Waiting])
def test_a_mistake_would_show(mistake):
    layer, wrong = layer_of("peri"), mistake()
    norm = layer.self_attn_bda.norm
    norm.register_forward_hook(lambda _, __, out: wrong(out))
    if mistake is CountingCalls:
        assert not replays_equal_steps(layer)
    else:
        with pytest.raises(HostWaitsError, match=r"_local_scalar_dense.* is not permitted"):
            replays_equal_steps(layer)
