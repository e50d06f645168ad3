"""What is changed in torch for the CPU, and whether it is still needed.

A test named ``upstream_still_...`` fails once the change can go.
"""

import datetime
import inspect
import os
import tempfile
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from tests.cpu import fresh
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


ROWS, HIDDEN, ROUGH, EXACT = 16384, 64, torch.bfloat16, torch.float64
GENERATOR = torch.Generator()
BOUND = 5e-3  # of sums that are rounded once to bf16, 2^-9 at most


def random(*shape, scale=1.0, offset=0.0):
    return (scale * torch.randn(*shape, generator=GENERATOR.manual_seed(sum(shape))) + offset).to(ROUGH)


def layer_norm(x, weight, bias):
    return F.layer_norm(x, (HIDDEN,), weight, bias)


NORMED = (random(ROWS, HIDDEN, offset=0.5), random(HIDDEN, scale=0.1, offset=1.0), random(HIDDEN, scale=0.1))
READ = torch.arange(ROWS).view(-1, 4) % 16  # each row of a table 1024 times
SUMS = {
    "layer_norm": (layer_norm, NORMED),
    "layer_norm without bias": (lambda x, weight: F.layer_norm(x, (HIDDEN,), weight), NORMED[:2]),
    "LayerNorm": (lambda x: torch.nn.LayerNorm(HIDDEN, dtype=x.dtype)(x), NORMED[:1]),
    "rms_norm": (lambda x, weight: F.rms_norm(x, (HIDDEN,), weight), NORMED[:2]),
    "embedding": (lambda table: F.embedding(READ, table), (random(16, HIDDEN),)),
    "linear": (F.linear, (NORMED[0], random(HIDDEN, HIDDEN, scale=0.1), NORMED[2])),
    "positions": (lambda x, table: x.view(64, -1, HIDDEN) + table[:, None], (NORMED[0], random(64, HIDDEN))),
    "bias": (torch.add, (NORMED[0], NORMED[2])),
    "product": (torch.mul, (NORMED[0], NORMED[1])),
    "experts' tokens": (lambda x: x.index_select(0, READ.flatten()), (random(16, HIDDEN),)),
    "experts' sums": (
        lambda x: x.new_zeros(16, HIDDEN).scatter_add(0, READ.view(-1, 1).expand(-1, HIDDEN), x),
        NORMED[:1],
    ),
    "repeated groups": (lambda x: x.repeat_interleave(1024, 0), (random(16, HIDDEN),)),
    "softmax": (lambda x: x.softmax(-1), (random(64, 2048),)),
}
"""What sums over tokens in a training step in bf16, forward or backward."""


def worst_error(function, inputs):
    """Return the largest error of the result and of any gradient, each relative to its own norm."""
    results = []
    for dtype in (ROUGH, EXACT):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        out = function(*leaves)
        factor = random(*out.shape).to(dtype)
        results.append((out, *torch.autograd.grad(out, leaves, factor)))
    pairs = zip(*results, strict=True)
    assert all(mine.dtype == ROUGH for mine in results[0])
    return max(((mine.double() - exact).norm() / exact.norm()).item() for mine, exact in pairs)


@pytest.mark.parametrize("name", SUMS)
def test_sums_over_tokens_are_those_of_fp64_rounded(name):
    assert worst_error(*SUMS[name]) < BOUND


def without(monkeypatch, name, kept_as):
    """Put torch's own function back."""
    monkeypatch.setattr(F, name, inspect.getclosurevars(getattr(F, name)).nonlocals[kept_as])


def test_upstream_still_sums_gradients_of_layer_norm_in_bf16(monkeypatch):
    without(monkeypatch, "layer_norm", "layer_norm")
    assert worst_error(*SUMS["layer_norm"]) > 0.1


def test_upstream_still_sums_gradients_of_embeddings_in_bf16(monkeypatch):
    without(monkeypatch, "embedding", "embedding")
    assert worst_error(*SUMS["embedding"]) > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_left_to_torch(monkeypatch, dtype):
    def results():
        inputs = [tensor.to(dtype).requires_grad_() for tensor in NORMED]
        table = random(16, HIDDEN).to(dtype).requires_grad_()
        outputs = layer_norm(*inputs), F.embedding(READ, table)
        return [*outputs, *torch.autograd.grad([out.sin().sum() for out in outputs], [*inputs, table])]

    ours = results()
    without(monkeypatch, "layer_norm", "layer_norm")
    without(monkeypatch, "embedding", "embedding")
    assert all(torch.equal(*pair) for pair in zip(ours, results(), strict=True))


@pytest.mark.parametrize(
    "options", [{"padding_idx": 0}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_embeddings_with_options_are_left_to_torch(monkeypatch, options):
    def results():
        table = torch.nn.Embedding.from_pretrained(random(16, 4), freeze=False, **options)
        out = table(READ)
        out.float().sin().sum().backward()
        return out, table.weight.grad.to_dense()

    ours = results()
    without(monkeypatch, "embedding", "embedding")
    assert all(torch.equal(*pair) for pair in zip(ours, results(), strict=True))


def test_an_embedding_still_refuses_what_it_has_no_row_for():
    with pytest.raises(IndexError, match="out of range"):
        F.embedding(torch.tensor([16]), random(16, HIDDEN))


def test_upstream_still_gathers_parts_of_one_size():
    """Two ranks, as threads, one with two rows and one with three."""
    store, refused = torch.distributed.HashStore(), []

    def be_rank(rank):
        group = torch.distributed.ProcessGroupGloo(store, rank, 2, datetime.timedelta(seconds=20))
        parts = [torch.empty(2, 4), torch.empty(3, 4)]
        try:
            group.allgather([parts], [torch.ones(2 + rank, 4)]).wait()
        except (RuntimeError, ValueError) as error:
            refused.append(str(error))

    ranks = [threading.Thread(target=be_rank, args=(rank,)) for rank in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert len(refused) == 2
    assert all("invalid tensor size" in message for message in refused)


def devices_of(groups):
    """Return how many devices these groups have, each of which has a thread."""
    return len({device for group in groups for device in group.options._devices})


def test_upstream_still_has_a_device_for_each_group():
    patience = datetime.timedelta(seconds=20)
    groups = [
        torch.distributed.ProcessGroupGloo(torch.distributed.HashStore(), 0, 1, patience) for _ in range(3)
    ]
    assert devices_of(groups) == len(groups)


def sum_in_groups():
    """Be both ranks of a job, of which the second is a fork; return what the first finds."""
    with tempfile.TemporaryDirectory() as folder:
        rank = int(os.fork() == 0)
        store = torch.distributed.FileStore(f"{folder}/store", 2)
        patience = datetime.timedelta(seconds=27)
        torch.distributed.init_process_group("nccl", store=store, rank=rank, world_size=2, timeout=patience)
        pair = torch.distributed.new_group([0, 1], timeout=2 * patience)
        alone = [torch.distributed.new_group([one]) for one in range(2)][rank]
        sums = [torch.tensor([1.0 + rank]) for _ in range(3)]
        for numbers, group in zip(sums, (None, pair, alone), strict=True):
            torch.distributed.all_reduce(numbers, group=group)
        torch.distributed.barrier()
        if rank:
            os._exit(0)
    groups = [
        group._get_backend(torch.device("cpu"))
        for group in (torch.distributed.distributed_c10d._get_default_group(), pair, alone)
    ]
    settings = groups[1].options
    assert settings.group_name == pair.group_name and list(settings.global_ranks_in_group) == [0, 1]
    return devices_of(groups), [numbers.item() for numbers in sums], settings._timeout.total_seconds()


def test_all_groups_of_a_process_share_a_device():
    devices, sums, seconds = fresh.call(sum_in_groups)
    assert devices == 1
    assert sums == [3, 3, 1]
    assert seconds == 54
