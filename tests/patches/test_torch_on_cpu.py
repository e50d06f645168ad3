"""What is changed in torch for the CPU, and whether it is still needed.

A test named ``upstream_still_...`` fails once the change can go.
"""

import inspect

import pytest
import torch
from torch.utils.data import DataLoader

from tests.cpu.unpatched import copy_of


def add_one(x):
    return x + 1


@pytest.mark.parametrize(
    "decorated",
    [
        lambda: torch.compile(add_one),
        lambda: torch.compile()(add_one),
        lambda: torch.compile(fullgraph=True, dynamic=False)(add_one),
        lambda: torch.compile(add_one, mode="max-autotune"),
        lambda: torch.compile(model=add_one),
    ],
)
def test_compile_returns_its_argument(decorated):
    assert decorated() is add_one


def test_compile_returns_modules_too():
    module = torch.nn.Linear(2, 2)
    assert torch.compile(module) is module


@pytest.mark.parametrize("name", ["megatron.core.jit", "megatron.core.transformer.moe.router"])
def test_upstream_still_compiles_while_being_imported(monkeypatch, name):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    module = copy_of(name)
    getattr(module, "jit_fuser", add_one)(add_one)
    assert compiled


def order_and_state(loader):
    """Return what ``loader`` yields in two epochs, and whether that left the device's random state alone."""
    state = torch.cuda.get_rng_state()
    order = [[int(item) for item in loader] for _ in range(2)]
    return order, torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("shuffle", [False, True])
def test_data_loaders_leave_the_random_state_of_the_device_alone(shuffle):
    torch.manual_seed(3)
    order, untouched = order_and_state(DataLoader(range(20), shuffle=shuffle))
    assert untouched
    assert [sorted(epoch) for epoch in order] == [list(range(20))] * 2
    assert (order[0] != order[1]) is shuffle
    assert order_and_state(DataLoader(range(20), shuffle=shuffle))[0] == order


def test_data_loaders_draw_from_the_generator_they_are_given():
    given = torch.Generator().manual_seed(3)
    loader = DataLoader(range(20), shuffle=True, generator=given)
    assert loader.generator is given
    order, untouched = order_and_state(loader)
    assert untouched
    assert order != order_and_state(DataLoader(range(20), shuffle=True, generator=given))[0]


def test_upstream_still_draws_from_the_cpu_generator_in_data_loaders(monkeypatch):
    unpatched = inspect.getclosurevars(DataLoader.__init__).nonlocals["init"]
    monkeypatch.setattr(DataLoader, "__init__", unpatched)
    assert not order_and_state(DataLoader(range(20)))[1]
