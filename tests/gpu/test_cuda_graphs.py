"""Layers as CUDA graphs (--cuda-graph-impl local): training steps are those of layers without graphs."""

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import cuda_graphs

from megatron_periln.patches.transformer_layers import without_graphs
from tests.models import small

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process")]

STEPS, RATE = 5, 0.05
WAYS = [(placement, False) for placement in [*small.PLACEMENTS, "gated-peri"]] + [("peri", True)]


@pytest.fixture(autouse=True)
def graphs_end_with_the_test():
    stream = torch.cuda.current_stream()
    yield
    cuda_graphs.delete_cuda_graphs()
    torch.cuda.set_stream(stream)


def build(placement, fuse, graphs, monkeypatch, **options):
    def seed(value=1234):
        tensor_parallel.model_parallel_cuda_manual_seed(
            value, use_cudagraphable_rng=True, force_reset_rng=True
        )
        torch.manual_seed(value)

    monkeypatch.setattr(small, "seed", seed)
    changes = {"cuda_graph_impl": "local"} if graphs else {}
    transformer = small.transformer_config(**small.SWIGLU, **changes, **options)
    fused = {"fuse_pre_mlp_norm": True} if fuse else {}
    model = small.perturb(small.build(placement, transformer, **fused)).cuda()
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    return model


def losses(model, rate=RATE, steps=STEPS):
    """Take steps down the gradient; return their losses."""
    ids = small.tokens()[0].cuda()
    positions = torch.arange(small.SEQUENCE, device="cuda").expand_as(ids)
    taken = []
    for _ in range(steps):
        loss = model(ids, positions, None, labels=ids).mean()
        loss.backward()
        cuda_graphs.create_cudagraphs()  # after the first step, as Megatron's schedules do
        taken.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:  # what no graph holds
                    parameter.main_grad += parameter.grad
                parameter -= rate * parameter.main_grad
                parameter.grad = None
                parameter.main_grad.zero_()
    return taken


@pytest.mark.parametrize(("placement", "fuse"), WAYS)
def test_steps_with_graphs_are_those_without(placement, fuse, monkeypatch):
    expected = losses(build(placement, fuse, False, monkeypatch))
    model = build(placement, fuse, True, monkeypatch)
    assert losses(model) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]
    assert all(layer.cudagraph_manager.cudagraph_runners[0].bwd_graph for layer in model.decoder.layers)


def test_each_replay_drops_other_elements(monkeypatch):
    model = build("peri", False, True, monkeypatch, hidden_dropout=0.3)
    assert len(set(losses(model, rate=0.0, steps=4)[1:])) == 3


def test_a_step_without_graphs_stands_between_those_with(monkeypatch):
    expected = losses(build("peri", False, False, monkeypatch), steps=3 * STEPS)
    model = build("peri", False, True, monkeypatch)
    taken = losses(model)
    with without_graphs([model]):
        taken += losses(model)
    taken += losses(model)
    assert taken == pytest.approx(expected, rel=1e-3)
