"""What cuDNN refuses ends in one line: before training where versions tell of it, else while training."""

from argparse import Namespace

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from megatron_periln.errors import UsageError
from megatron_periln.package_versions import VersionMismatch
from megatron_periln.training import cudnn_check
from tests.doctor import stand_in_engine

MISMATCH = VersionMismatch("Transformer Engine 2.17.1 needs cuDNN 9.22.0, and here is cuDNN 9.19.0", "pip it")


@pytest.fixture
def args(monkeypatch):
    """Of a run on a GPU, which the CPU stands in for."""
    monkeypatch.setattr(cudnn_check.cpu, "is_active", lambda: False)
    monkeypatch.setattr(cudnn_check, "find_cudnn_mismatch", lambda: MISMATCH)
    return Namespace(
        transformer_impl="transformer_engine",
        attention_backend=AttnBackend.auto,
        params_dtype=torch.bfloat16,
        rank=0,
        local_rank=0,
        world_size=1,
    )


def test_attention_that_fails_backward_is_refused_before_training(args, monkeypatch):
    stand_in_engine.install(monkeypatch, fails=True)
    with pytest.raises(UsageError) as error:
        cudnn_check.refuse_old_cudnn(args)
    text = str(error.value)
    assert text.startswith(f"{MISMATCH.what} (RuntimeError: cuDNN Error: ") and text.endswith("; pip it")
    assert "\n" not in text


def test_attention_that_works_all_the_same_trains(args, monkeypatch):
    """As with flash-attn, which Transformer Engine may take."""
    stand_in_engine.install(monkeypatch)
    cudnn_check.refuse_old_cudnn(args)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_backend": AttnBackend.unfused},
        {"attention_backend": AttnBackend.flash},
        {"transformer_impl": "local"},
        {"params_dtype": torch.float32},
    ],
    ids=str,
)
def test_what_cudnn_does_not_compute_is_not_tried(args, monkeypatch, changes):
    stand_in_engine.install(monkeypatch, fails=True)
    cudnn_check.refuse_old_cudnn(Namespace(**{**vars(args), **changes}))


def test_versions_that_fit_are_not_tried(args, monkeypatch):
    stand_in_engine.install(monkeypatch, fails=True)
    monkeypatch.setattr(cudnn_check, "find_cudnn_mismatch", lambda: None)
    cudnn_check.refuse_old_cudnn(args)


@pytest.mark.parametrize("known", [True, False])
def test_what_cudnn_refuses_while_training_is_one_line(args, monkeypatch, known):
    if not known:
        monkeypatch.setattr(cudnn_check, "find_cudnn_mismatch", lambda: None)
    with pytest.raises(UsageError) as error, cudnn_check.cudnn_in_one_line(args):
        raise RuntimeError(f"{stand_in_engine.BAD_PARAM}\nmore")
    text = str(error.value)
    assert "\n" not in text and "CUDNN_ATTR_OPERATION_RESHAPE_MODE" in text
    if known:
        assert text.startswith(MISMATCH.what) and text.endswith("; pip it")
    else:
        assert text.startswith("cuDNN 9.") and f"torch {torch.__version__}" in text
        assert "--attention-backend unfused" in text


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), ValueError("cuDNN Error")])
def test_other_errors_keep_their_traceback(args, error):
    with pytest.raises(type(error), match=str(error)), cudnn_check.cudnn_in_one_line(args):
        raise error
