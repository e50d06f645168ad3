"""What is changed in single layers, and whether it is still needed.

A test named ``upstream_still_...`` fails once the change can go.
"""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_periln.patches import transformer_layers
from tests.models import small

pytestmark = pytest.mark.usefixtures("single_process")

BDAS = ("self_attn_bda", "mlp_bda")


def layer_of(placement):
    return small.build(placement).decoder.layers[0]


def test_upstream_still_enables_grad_for_bias_dropout_add():
    assert layer_of("pre").bias_dropout_add_exec_handler is torch.enable_grad


def listed(layer, method):
    layer.config.cuda_graph_modules = [CudaGraphModule.attn, CudaGraphModule.mlp]
    return [id(module) for module in method()]


def test_bias_dropout_adds_are_listed_under_cuda_graphs():
    layer = layer_of("peri")
    found = listed(layer, layer._get_submodules_under_cudagraphs)
    assert found[-2:] == [id(getattr(layer, name)) for name in BDAS]
    assert id(layer.self_attention) in found


def test_upstream_still_lists_no_bias_dropout_add_under_cuda_graphs():
    layer = layer_of("peri")
    found = listed(layer, lambda: TransformerLayer._get_submodules_under_cudagraphs(layer))
    assert id(layer.self_attention) in found
    assert not {id(getattr(layer, name)) for name in BDAS} & set(found)


def test_upstream_still_has_a_function_for_bias_dropout_add():
    layer = layer_of("pre")
    assert not any(isinstance(getattr(layer, name), torch.nn.Module) for name in BDAS)


def test_a_bias_dropout_add_is_replaced_until_it_is_put_back():
    layer = SimpleNamespace(mlp_bda="upstream's")
    put_back = transformer_layers.replace_bda(layer, "mlp_bda", "ours")
    assert layer.mlp_bda == "ours"
    put_back()
    assert layer.mlp_bda == "upstream's"


def test_upstream_still_reads_the_embedding_in_two_places():
    reading = {
        name
        for name, method in vars(MultiTokenPredictionLayer).items()
        if inspect.isfunction(method) and re.search(r"\bembedding\(", inspect.getsource(method))
    }
    assert reading == {"_get_embeddings", "forward_single_position"}


class ReplayedError(Exception):
    """A graph was replayed."""


class Graphs(torch.nn.Module):
    """Stands for what replays a layer's graphs."""

    def forward(self, *_, **__):
        raise ReplayedError


def give_graphs(model, implementation):
    layer = model.decoder.layers[1]
    layer.config.cuda_graph_impl = implementation
    if implementation == "local":
        layer.cudagraph_manager = Graphs()
    else:
        model.decoder.cuda_graphs = model.decoder.layers[0].cuda_graphs = []
        layer.cuda_graphs = [Graphs()]
        layer._te_cuda_graph_replay = layer.cuda_graphs[0].forward  # upstream's needs Transformer Engine


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_upstream_still_replays_the_graphs_of_every_step(implementation):
    model = small.build("peri")
    give_graphs(model, implementation)
    with pytest.raises(ReplayedError):
        small.run(model)


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_layers_run_without_their_graphs_for_a_while(implementation):
    model = small.build("peri")
    expected = small.run(model)
    give_graphs(model, implementation)
    keys = set(model.state_dict())
    with transformer_layers.without_graphs([model]):
        assert torch.equal(small.run(model), expected)
    assert set(model.state_dict()) == keys
    with pytest.raises(ReplayedError):
        small.run(model)
