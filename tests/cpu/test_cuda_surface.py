"""``torch.cuda`` when the device is the CPU."""

import itertools

import pytest
import torch

from megatron_periln.cpu import cuda_surface
from tests.cpu import fresh


@pytest.fixture
def generator_as_it_was():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    "name, answer",
    {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "cpu",
        "get_device_capability": (8, 0),
        "utilization": 0,
        "temperature": 0,
        "power_draw": 0,
        "clock_rate": 0,
        "memory_snapshot": [],
    }.items(),
)
def test_there_is_one_device_and_it_answers(name, answer):
    assert getattr(torch.cuda, name)() == answer


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("init", ()),
        ("synchronize", ()),
        ("synchronize", ("cuda:0",)),
        ("set_device", (0,)),
        ("empty_cache", ()),
        ("ipc_collect", ()),
        ("reset_peak_memory_stats", ()),
        ("reset_max_memory_allocated", ()),
        ("nvtx.range_push", ("forward",)),
        ("nvtx.range_pop", ()),
        ("nvtx.range_start", ("forward",)),
        ("nvtx.range_end", (0,)),
        ("nvtx.mark", ("here",)),
    ],
)
def test_there_is_nothing_to_do(name, arguments):
    function = torch.cuda
    for part in name.split("."):
        function = getattr(function, part)
    assert function(*arguments) is None


def test_profiler_starts_and_stops():
    runtime = torch.cuda.cudart()
    for switch in (runtime.cudaProfilerStart, runtime.cudaProfilerStop):
        assert torch.cuda.check_error(switch()) is None


def test_every_stream_is_the_same_and_is_done():
    stream = torch.cuda.Stream(device="cuda", priority=-1)
    assert isinstance(torch.cuda.current_stream(), torch.cuda.Stream)
    assert stream == torch.cuda.current_stream() == torch.cuda.default_stream(0)
    assert torch.cuda.ExternalStream(0) == stream
    assert len({stream, torch.cuda.Stream()}) == 1
    assert stream != "stream"
    assert stream.query()
    assert stream.device == torch.device("cpu")
    stream.synchronize()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_stream(stream)
    event = stream.record_event()
    stream.wait_event(event)
    assert stream.record_event(event) is event
    with stream as entered:
        assert entered is stream
    assert torch.ones(2).record_stream(stream) is None


def test_events_take_the_time_in_milliseconds(monkeypatch):
    monkeypatch.setattr(cuda_surface.time, "perf_counter", itertools.count(step=0.25).__next__)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    end.record(torch.cuda.current_stream())
    end.synchronize()
    end.wait()
    assert end.query()
    assert start.elapsed_time(end) == 250.0
    assert start.elapsed_time(torch.cuda.current_stream().record_event()) == 500.0


@pytest.mark.parametrize("guard", ["device", "device_of", "stream", "StreamContext"])
def test_guards_enter_and_leave(guard):
    with getattr(torch.cuda, guard)(torch.cuda.Stream()):
        assert torch.empty(2, device="cuda").device.type == "cpu"


def growth(name):
    """Return by how much more is in use while there is a tensor of 64 MB."""
    in_use = getattr(torch.cuda, name)
    before = in_use()
    tensor = torch.ones(64 << 20, dtype=torch.uint8)
    more = in_use("cuda") - before
    del tensor
    return more


@pytest.mark.parametrize("name", ["memory_allocated", "memory_reserved", "device_memory_used"])
def test_memory_in_use_is_that_of_the_process(name):
    """In a process of its own: what earlier tests have freed would hold the tensor."""
    assert 60 << 20 < fresh.call(growth, name) < 256 << 20


@pytest.mark.parametrize("name", ["max_memory_allocated", "max_memory_reserved"])
def test_peak_memory_stays(name):
    tensor = torch.ones(64 << 20, dtype=torch.uint8)
    in_use = torch.cuda.memory_allocated()
    del tensor
    assert getattr(torch.cuda, name)(0) > in_use - (16 << 20)


def test_memory_statistics_have_every_key():
    stats = torch.cuda.memory_stats()
    for kind in ("allocated", "reserved"):
        assert 0 < stats[f"{kind}_bytes.all.current"] <= stats[f"{kind}_bytes.all.peak"]
    assert stats["num_alloc_retries"] == 0


def test_device_properties_describe_the_machine():
    properties = torch.cuda.get_device_properties(0)
    assert (properties.name, properties.major, properties.minor) == ("cpu", 8, 0)
    assert properties.multi_processor_count >= 1
    free, total = torch.cuda.mem_get_info()
    assert total == properties.total_memory
    assert total - torch.cuda.memory_allocated() == pytest.approx(free, rel=0.01)


def test_random_state_is_that_of_the_cpu(generator_as_it_was):
    torch.cuda.manual_seed(7)
    assert torch.cuda.initial_seed() == torch.initial_seed() == 7
    state = torch.cuda.get_rng_state("cuda")
    assert torch.equal(state, torch.get_rng_state())
    drawn = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state, device="cuda")
    assert torch.equal(torch.rand(4), drawn)
    torch.cuda.set_rng_state_all([state])
    assert torch.equal(torch.rand(4), drawn)
    torch.cuda.manual_seed(7)
    assert torch.equal(torch.cuda.get_rng_state_all()[0], state)
    torch.cuda.random.set_rng_state(state)
    assert torch.equal(torch.cuda.random.get_rng_state(), state)
    assert torch.cuda.default_generators[torch.cuda.current_device()] is torch.default_generator


def test_seeding_every_device_seeds_the_cpu_once(generator_as_it_was):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for seed_again in (lambda: torch.cuda.manual_seed_all(8), torch.cuda.seed, torch.cuda.seed_all):
        seed_again()
        assert torch.equal(torch.get_rng_state(), state)


def test_lazy_calls_run_at_once():
    called = []
    torch.cuda._lazy_call(lambda: called.append(True), seed=True)
    assert called == [True]


def test_accelerator_still_says_there_is_none():
    assert not torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 0
    assert torch.accelerator.current_accelerator() is None


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("can_device_access_peer", (0, 0)),
        ("set_sync_debug_mode", ("warn",)),
        ("set_per_process_memory_fraction", (0.5,)),
        ("get_stream_from_external", (0,)),
    ],
)
def test_unmapped_call_fails_loudly(name, arguments):
    with pytest.raises(RuntimeError, match="without a CPU counterpart was called under --device cpu"):
        getattr(torch.cuda, name)(*arguments)


def test_functions_are_distinct_objects():
    functions = [value for value in cuda_surface.surface().values() if not isinstance(value, type | tuple)]
    assert len(set(functions)) == len(functions)
