"""The dense model that a mixture of experts starts from: tests/training/test_pretrain.py loads one."""

import inspect

from megatron.training import training
from megatron.training.checkpointing import load_checkpoint


def test_upstream_still_loads_the_dense_model_under_another_name():
    assert "'model': dense_model_for_upcycling" in inspect.getsource(training.setup_model_and_optimizer)
    assert "model" not in inspect.signature(load_checkpoint).parameters
