"""What is changed in Megatron for the CPU, and whether it is still needed.

A test named ``upstream_still_...`` fails once the change can go.
"""

import importlib.util
import logging
import types

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.gated_delta_net import common
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils, token_dispatcher

from tests.cpu.unpatched import copy_of
from tests.models import small

RNG_LOGGER = logging.getLogger(random.__name__)


class Contexts:
    """Stands in for multiprocessing; remembers by which method processes would be started."""

    def __init__(self):
        self.methods = []

    def get_context(self, method):
        self.methods.append(method)
        return types.SimpleNamespace(Manager=lambda: types.SimpleNamespace(Queue=object))


@pytest.mark.parametrize("arguments", [(), ("spawn",), ("forkserver",)])
def test_the_queue_of_the_checkpoint_writer_comes_from_a_fork(monkeypatch, arguments):
    contexts = Contexts()
    # The wrapped function's globals are the module's, whichever name it goes by.
    monkeypatch.setattr(filesystem_async, "mp", contexts)
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    filesystem_async.get_write_results_queue(*arguments)
    assert contexts.methods == ["fork"]


def test_checkpoint_writer_asks_for_the_queue_by_its_patched_name():
    writer = filesystem_async.FileSystemWriterAsync.prepare_write_data
    assert "get_write_results_queue" in writer.__code__.co_names
    assert writer.__globals__["get_write_results_queue"] is filesystem_async.get_write_results_queue


def test_upstream_still_spawns_the_queue_of_the_checkpoint_writer(monkeypatch):
    upstream, contexts = copy_of(filesystem_async.__name__), Contexts()
    monkeypatch.setattr(upstream, "mp", contexts)
    upstream.get_write_results_queue()
    assert contexts.methods == ["spawn"]


def test_upstream_still_spawns_the_process_of_the_checkpoint_writer(monkeypatch):
    upstream, contexts = copy_of(async_utils.__name__), Contexts()
    monkeypatch.setattr(upstream, "mp", contexts)
    with pytest.raises(AttributeError, match="JoinableQueue"):
        upstream.PersistentAsyncCaller._get_process(0)
    assert contexts.methods == ["spawn"]


def preloaded(writer, tensor):
    ((_, _, (_, ((_, copy),))),) = writer.preload_tensors([("path", "key", ([], [("item", tensor)]))])
    return copy


def test_tensors_that_are_shared_are_copied_before_training_goes_on():
    shared, own = torch.ones(3).share_memory_(), torch.ones(3)
    copy = preloaded(filesystem_async.FileSystemWriterAsync, shared)
    shared.zero_()
    assert copy.tolist() == [1, 1, 1]
    assert preloaded(filesystem_async.FileSystemWriterAsync, own) is own


def test_upstream_still_preloads_tensors_without_a_copy():
    upstream = copy_of(filesystem_async.__name__).FileSystemWriterAsync
    shared = torch.ones(3).share_memory_()
    assert preloaded(upstream, shared).data_ptr() == shared.data_ptr()


def draw_inside_the_tracker():
    state = torch.get_rng_state()
    tracker = random.CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 5)
    with tracker.fork():
        drawn = torch.rand(2, device="cuda")
    assert torch.equal(torch.get_rng_state(), state)
    return drawn


def test_random_tracker_draws_without_a_warning(caplog):
    assert torch.equal(draw_inside_the_tracker(), draw_inside_the_tracker())
    assert not caplog.records


def test_other_warnings_of_the_random_tracker_are_kept(caplog):
    RNG_LOGGER.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_upstream_still_warns_that_the_random_state_of_the_cpu_moved(monkeypatch, caplog):
    monkeypatch.setattr(RNG_LOGGER, "filters", [])
    draw_inside_the_tracker()
    assert [record.getMessage() for record in caplog.records] == [
        "CPU RNG state changed within GPU RNG context"
    ]


@pytest.mark.parametrize("module", [moe_utils, token_dispatcher])
def test_split_sizes_convert_to_numpy(module):
    sizes = torch.tensor([3, 5])
    converted = module.maybe_move_tensor_to_cpu(sizes, as_numpy=True, record_stream=True)
    assert isinstance(converted, np.ndarray)
    assert converted.tolist() == [3, 5]
    gated = module.maybe_move_tensor_to_cpu(torch.ones(2, requires_grad=True), as_numpy=True)
    assert gated.tolist() == [1, 1]
    assert module.maybe_move_tensor_to_cpu(sizes) is sizes
    assert module.maybe_move_tensor_to_cpu(None, as_numpy=True) is None
    assert module.maybe_move_tensor_to_cpu([3, 5], as_numpy=True) == [3, 5]


def test_upstream_still_converts_cuda_tensors_only():
    upstream = copy_of(moe_utils.__name__)
    assert torch.is_tensor(upstream.maybe_move_tensor_to_cpu(torch.tensor([3, 5]), as_numpy=True))


def refuse_to_compile(*_, **__):
    raise AssertionError("an extension would be compiled")


def test_discarded_outputs_are_recomputed_without_compiling_anything(monkeypatch):
    monkeypatch.setattr(random, "load_inline", refuse_to_compile)
    monkeypatch.setattr(random, "_share_storage_ext", None)

    def function(x, weight):
        return (x * weight).exp()

    x, weight = (torch.linspace(0.1, 1, 6).requires_grad_() for _ in range(2))
    expected = torch.autograd.grad(function(x, weight).square().sum(), (x, weight))

    # None, as patches.fixes.checkpoint_without_output_off_fp8 passes it on.
    checkpoint = random.CheckpointWithoutOutput(fp8=None)
    output = checkpoint.checkpoint(function, x, weight)
    squared = output.view(2, 3).square()
    checkpoint.discard_output_and_register_recompute(squared)
    assert output.untyped_storage().nbytes() == 0
    squared.sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


def test_upstream_still_compiles_an_extension_to_restore_outputs(monkeypatch):
    upstream = copy_of(random.__name__)
    monkeypatch.setattr(upstream, "load_inline", refuse_to_compile)
    with pytest.raises(AssertionError, match="an extension would be compiled"):
        upstream._get_share_storage()


def layer_config(**changes):
    return small.transformer_config(is_hybrid_model=True, **changes)


def test_upstream_still_has_no_mamba_layer_without_its_packages():
    if importlib.util.find_spec("mamba_ssm") is not None:
        pytest.skip("mamba-ssm is installed")
    with pytest.raises(ImportError, match="MambaSSM is not installed"):
        copy_of(mamba_mixer.__name__).MambaMixer(layer_config(), None, 32)


def test_upstream_still_has_no_delta_net_without_its_package():
    if importlib.util.find_spec("fla") is not None:
        pytest.skip("flash-linear-attention is installed")
    with pytest.raises(ImportError, match="FLA is not installed"):
        copy_of(common.__name__)._GDNBase(layer_config(), None)


def test_the_norm_of_a_mamba_layer_is_saved_by_heads(single_process):
    norm = mamba_mixer.ExtendedRMSNorm(8, group_size=4, norm_before_gate=False)
    groups = small.groups()
    norm.tp_group = groups.tp
    (tensor,) = norm.sharded_state_dict("norm.", metadata={"dp_cp_group": groups.dp_cp}).values()
    assert (tensor.key, tensor.global_shape) == ("norm.weight", (8,))
