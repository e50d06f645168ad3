"""Loading a checkpoint runs no code from it, on any path."""

import inspect
import io
import os
import pickle
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, filesystem
from torch.distributed.checkpoint.metadata import TensorProperties

from megatron_periln.checkpoints.reader import Checkpoint
from megatron_periln.checkpoints.saved_arguments import saved_arguments
from megatron_periln.errors import UsageError
from megatron_periln.patches import checkpoint_loading, fixes
from tests.cpu.unpatched import copy_of


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bomb(tmp_path):
    bomb = Bomb(tmp_path / "exploded")
    yield bomb
    assert not bomb.path.exists()


@pytest.fixture
def step(tmp_path):
    """The folder of an iteration that a tracker names."""
    folder = tmp_path / "checkpoints" / "iter_0000003"
    folder.mkdir(parents=True)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("3")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return folder


@pytest.fixture
def distributed(step, single_process):
    """A checkpoint that Megatron saved."""
    state = {"args": Namespace(norm_placement="peri", num_layers=2), "iteration": 3}
    dist_checkpointing.save(state, str(step), async_strategy="mcore")
    return step


def load(step):
    return saved_arguments(Namespace(load=str(step.parent), ckpt_step=None))


def test_the_bomb_explodes_where_nothing_stops_it(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_what_megatron_saves_is_loaded(distributed):
    assert load(distributed).norm_placement == "peri"


def test_metadata(distributed, bomb):
    (distributed / ".metadata").write_bytes(pickle.dumps(bomb))
    for read in (load, lambda step: Checkpoint(step.parent)):
        with pytest.raises(UsageError, match=r"can't be read: .*\.mkdir has no place"):
            read(distributed)
    with pytest.raises(pickle.UnpicklingError, match="has no place"):
        FileSystemReader(distributed).read_metadata()


@pytest.mark.parametrize(
    "code",
    [
        b"ctorch.distributed.checkpoint.metadata\nos.system\n(S'false'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x08hub.load\x93.",
    ],
)
def test_metadata_by_other_names(distributed, code):
    (distributed / ".metadata").write_bytes(code)
    with pytest.raises(UsageError, match="has no place"):
        load(distributed)


def test_metadata_inside_what_is_allowed(distributed, bomb):
    metadata = FileSystemReader(distributed).read_metadata()
    metadata.planner_data = bomb
    (distributed / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UsageError, match="has no place"):
        load(distributed)


def test_objects_in_distcp(distributed, bomb):
    """Arguments and other objects that are no tensors."""
    metadata = FileSystemReader(distributed).read_metadata()
    (place,) = (place for index, place in metadata.storage_data.items() if "common_state" in index.fqn)
    path = distributed / place.relative_path
    torch.save([{"args": bomb}], path)
    place.offset, place.length = 0, path.stat().st_size
    (distributed / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UsageError, match="can't be read: Weights only load failed"):
        load(distributed)


def test_upstream_still_loads_any_object_that_is_no_tensor(distributed, tmp_path):
    """Once this fails, the half of checkpoint_loading that it is about can go."""
    value = io.BytesIO()
    torch.save(Bomb(tmp_path / "exploded"), value)
    value.seek(0)
    checked = DefaultLoadPlanner.load_bytes
    original = inspect.getclosurevars(checked).nonlocals["load_bytes"]
    planner = SimpleNamespace(flatten_state_dict=False, state_dict={})
    with pytest.raises(pickle.UnpicklingError):
        checked(planner, SimpleNamespace(dest_index=SimpleNamespace(fqn="x")), value)
    assert not (tmp_path / "exploded").exists()
    value.seek(0)
    original(planner, SimpleNamespace(dest_index=SimpleNamespace(fqn="x")), value)
    assert (tmp_path / "exploded").exists()


@pytest.fixture
def of_a_newer_torch(step, single_process, monkeypatch):
    """A checkpoint whose .metadata has one value more to a tensor than this torch knows."""
    weight = dist_checkpointing.ShardedTensor.from_rank_offsets("weight", torch.ones(3))
    state = {"args": Namespace(norm_placement="peri"), "iteration": 3, "weight": weight}
    dist_checkpointing.save(state, str(step), async_strategy="mcore")
    get_state = TensorProperties.__getstate__
    with monkeypatch.context() as newer:
        newer.setattr(TensorProperties, "__getstate__", lambda self: (*get_state(self), "new"))
        metadata = pickle.dumps(FileSystemReader(step).read_metadata())
    (step / ".metadata").write_bytes(metadata)
    return step


def test_a_newer_torch_is_named(of_a_newer_torch):
    """Torch itself says "too many values to unpack", or that there is no metadata."""
    for read in (load, lambda step: Checkpoint(step.parent)):
        with pytest.raises(UsageError) as caught:
            read(of_a_newer_torch)
        assert f"a newer torch than this {torch.__version__} wrote it" in str(caught.value)
        assert "it is not damaged: install the torch that wrote it" in str(caught.value)


def test_strict_loading_knows_the_tensors(step, single_process):
    """Every ``--dist-ckpt-strictness`` but the default reads them before it loads."""
    weight = torch.arange(3.0)
    sharded = {"weight": dist_checkpointing.ShardedTensor.from_rank_offsets("weight", weight)}
    dist_checkpointing.save(sharded, str(step), async_strategy="mcore")
    fixes.apply()
    sharded["weight"].data = torch.zeros(3)
    for strict in ("raise_all", "log_all", "return_all"):
        loaded = dist_checkpointing.load(sharded, str(step), strict=strict)
        loaded = loaded[0] if strict == "return_all" else loaded
        assert torch.equal(loaded["weight"], weight)
    other = {"other": dist_checkpointing.ShardedTensor.from_rank_offsets("other", torch.zeros(3))}
    with pytest.raises(dist_checkpointing.core.CheckpointingException, match="other"):
        dist_checkpointing.load(other, str(step), strict="raise_all")


def test_upstream_still_gives_strides_to_empty():
    upstream = copy_of(TorchDistLoadShardedStrategy.__module__).TorchDistLoadShardedStrategy
    assert "**tp.properties.__dict__" in inspect.getsource(upstream.load_tensors_metadata)
    with pytest.raises(TypeError, match="strides"):
        torch.empty(3, **vars(TensorProperties()))


def test_common_pt(step, bomb):
    torch.save({"args": bomb}, step / "common.pt")
    with pytest.raises(UsageError, match="can't be read: Weights only load failed"):
        load(step)


def test_the_torch_format(step, bomb):
    (step / "metadata.json").unlink()
    (step / "mp_rank_00").mkdir()
    torch.save({"args": bomb}, step / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(UsageError, match="can't be read: Weights only load failed"):
        load(step)
    torch.save({"args": Namespace(norm_placement="post")}, step / "mp_rank_00" / "model_optim_rng.pt")
    assert load(step).norm_placement == "post"


def test_upstream_still_loads_any_object_from_the_metadata(distributed, tmp_path, monkeypatch):
    """Once this fails, the half of checkpoint_loading that it is about can go."""
    monkeypatch.setattr(filesystem, "pickle", pickle)
    (distributed / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(AttributeError):
        FileSystemReader(distributed).read_metadata()
    assert (tmp_path / "exploded").exists()


def test_no_part_of_the_package_asks_for_more():
    package = Path(checkpoint_loading.__file__).parents[1]
    for path in package.rglob("*.py"):
        if path != Path(checkpoint_loading.__file__):  # which speaks of it
            assert "weights_only=False" not in path.read_text(), path


def test_remote_code_of_tokenizers_is_off_unless_asked_for(monkeypatch):
    from megatron.training.arguments import parse_args

    from megatron_periln.training.parsing import add_arguments

    monkeypatch.setattr("sys.argv", ["pretrain"])
    assert parse_args(add_arguments).trust_remote_code is False
    monkeypatch.setattr("sys.argv", ["pretrain", "--trust-remote-code"])
    assert parse_args(add_arguments).trust_remote_code is True
