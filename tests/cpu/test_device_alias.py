"""Whoever asks for ``"cuda"`` gets the CPU; whatever else is asked for is what comes out."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from torch import distributed

from megatron_periln.cpu.device_alias import on_cpu
from tests.cpu import fresh

SPELLINGS = ["cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0)]
FACTORIES = {
    "arange": (4,),
    "as_tensor": ([1.0, 2.0],),
    "asarray": ([1.0, 2.0],),
    "empty": (2, 3),
    "empty_permuted": ((2, 3), (0, 1)),
    "empty_strided": ((2, 3), (3, 1)),
    "eye": (3,),
    "full": ((2,), 0),
    "linspace": (0, 1, 3),
    "logspace": (0, 1, 3),
    "ones": (2,),
    "rand": (2,),
    "randint": (0, 5, (2,)),
    "randn": (2,),
    "randperm": (4,),
    "sparse_coo_tensor": ([[0, 1]], [1.0, 2.0], (3,)),
    "tensor": ([1.0, 2.0],),
    "tril_indices": (3, 3),
    "triu_indices": (3, 3),
    "zeros": (2,),
    "hann_window": (4,),
    "fft.fftfreq": (4,),
    "fft.rfftfreq": (4,),
}
LIKES = ["empty", "full", "ones", "rand", "randint", "randn", "zeros"]
NEWS = {
    "new_empty": ((2,),),
    "new_zeros": (2,),
    "new_ones": (2,),
    "new_full": ((2,), 0),
    "new_tensor": ([1.0],),
    "new_empty_strided": ((2,), (1,)),
}


def on_the_cpu(tensor):
    return tensor.device == torch.device("cpu")


@pytest.mark.parametrize("device", SPELLINGS, ids=repr)
def test_every_spelling_of_the_device_is_the_cpu(device):
    assert on_cpu(device) == torch.device("cpu")
    assert on_the_cpu(torch.empty(2, device=device))
    assert on_the_cpu(torch.ones(2).to(device))
    assert on_the_cpu(torch.nn.Linear(2, 2).to(device).weight)


@pytest.mark.parametrize("device", ["cpu", "meta", torch.device("cpu"), torch.device("meta"), None, True])
def test_other_devices_are_themselves(device):
    assert on_cpu(device) is device


@pytest.mark.parametrize("name", FACTORIES)
def test_factories_make_on_the_cpu(name):
    factory = torch
    for part in name.split("."):
        factory = getattr(factory, part)
    assert on_the_cpu(factory(*FACTORIES[name], device="cuda"))
    assert on_the_cpu(factory(*FACTORIES[name]))


@pytest.mark.parametrize("name", LIKES)
def test_like_factories_make_on_the_cpu(name):
    like = getattr(torch, f"{name}_like")
    fill = {"full": (0,), "randint": (5,)}.get(name, ())
    made = like(torch.empty(2, 3), *fill, device="cuda")
    assert on_the_cpu(made)
    assert made.shape == (2, 3)
    assert like(torch.empty(2, device="meta"), *fill).device.type == "meta"


@pytest.mark.parametrize("name", NEWS)
def test_new_methods_make_on_the_cpu(name):
    tensor = torch.ones(2, dtype=torch.float64)
    made = getattr(tensor, name)(*NEWS[name], device="cuda")
    assert on_the_cpu(made)
    assert made.dtype == torch.float64


def test_tensors_move_to_the_cpu_and_keep_their_values():
    tensor = torch.arange(3.0, requires_grad=True)
    moves = [
        partial(tensor.to, "cuda"),
        partial(tensor.to, device="cuda", non_blocking=True),
        tensor.cuda,
        partial(tensor.cuda, 0, non_blocking=True),
        tensor.pin_memory,
    ]
    for move in moves:
        assert move() is tensor
    assert tensor.to("cuda", torch.float64).dtype == torch.float64
    assert tensor.to(device="cuda", dtype=torch.float64).dtype == torch.float64
    assert tensor.to("cuda", copy=True) is not tensor


def test_what_is_not_a_device_stays_what_it_is():
    tensor = torch.ones(2)
    assert tensor.to(torch.float64).dtype == torch.float64
    assert tensor.to(torch.ones(1, dtype=torch.int64)).dtype == torch.int64
    assert tensor.to("meta").device.type == "meta"
    assert torch.full((2,), 0).tolist() == [0, 0]
    assert torch.full((2,), True, device="cuda").dtype == torch.bool
    assert torch.tensor(1, device="cuda").item() == 1
    assert torch.ones(2, 0, device="cuda").shape == (2, 0)
    assert torch.empty(2, device="meta").device.type == "meta"


def test_modules_move_to_the_cpu_and_convert():
    module = torch.nn.Linear(2, 2)
    weight = module.weight
    for move in (partial(module.to, "cuda"), partial(module.to, device="cuda"), module.cuda):
        assert move() is module
        assert module.weight is weight
    assert module.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert module.to("cuda", torch.float32).weight.dtype == torch.float32
    assert module.to("meta").weight.device.type == "meta"
    with pytest.raises(NotImplementedError, match="meta tensor"):
        module.to("cuda")


@pytest.mark.parametrize("factory", [torch.empty, torch.zeros, torch.rand])
def test_nothing_is_pinned(factory):
    assert not factory(2, pin_memory=True).is_pinned()


@pytest.mark.parametrize(
    "where", ["cuda", torch.device("cuda", 0), "cpu", {"cpu": "cpu"}, lambda s, _: s, None]
)
def test_saved_tensors_load_to_the_cpu(where):
    file = io.BytesIO()
    torch.save({"x": torch.arange(3)}, file)
    file.seek(0)
    loaded = torch.load(file, map_location=where, weights_only=True)["x"]
    assert on_the_cpu(loaded)
    assert loaded.tolist() == [0, 1, 2]


def test_saved_tensors_load_to_meta():
    file = io.BytesIO()
    torch.save(torch.arange(3), file)
    file.seek(0)
    assert torch.load(file, "meta").device.type == "meta"


@pytest.mark.parametrize(
    "dtype, name",
    [
        (torch.float32, "torch.cuda.FloatTensor"),
        (torch.float16, "torch.cuda.HalfTensor"),
        (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
        (torch.int64, "torch.cuda.LongTensor"),
    ],
)
def test_type_names_are_those_of_cuda_there_and_back(dtype, name):
    tensor = torch.ones(2, dtype=dtype)
    assert tensor.type() == name
    back = torch.ones(2, dtype=torch.float64).type(name)
    assert back.dtype == dtype
    assert on_the_cpu(back)


def test_types_given_otherwise_convert_as_ever():
    assert torch.ones(2).type("torch.DoubleTensor").dtype == torch.float64
    assert torch.ones(2).type(torch.int32).dtype == torch.int32
    assert torch.ones(2).type(dtype=torch.int32).dtype == torch.int32


def test_numpy_arrays_become_tensors():
    assert torch.as_tensor(np.arange(3), device="cuda").tolist() == [0, 1, 2]
    assert torch.from_numpy(np.arange(3)).cuda().tolist() == [0, 1, 2]


def backends_of_groups_over_nccl():
    device = torch.device("cuda", 0)
    store = distributed.HashStore()
    distributed.init_process_group(backend="nccl", store=store, rank=0, world_size=1, device_id=device)
    groups = {
        "world": None,
        "new_group": distributed.new_group([0], backend="nccl", device_id=device),
        "new_group, positional": distributed.new_group([0], None, "nccl"),
        "by enumeration": distributed.new_subgroups_by_enumeration([[0]], backend="nccl")[0],
        "gloo": distributed.new_group([0], backend="gloo"),
    }
    total = torch.ones(2, device="cuda")
    for group in groups.values():
        distributed.all_reduce(total, group=group)
    assert total.tolist() == [1, 1]
    return {name: distributed.get_backend(group) for name, group in groups.items()}


def test_process_groups_over_nccl_come_out_over_gloo():
    assert set(fresh.call(backends_of_groups_over_nccl).values()) == {"gloo"}
