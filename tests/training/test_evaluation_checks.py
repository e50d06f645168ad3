"""Batches of evaluation that would fail at the first one are refused before training."""

from argparse import Namespace

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.rules import refuse
from megatron_periln.training.evaluation_checks import EVALUATION

FITTING = {
    "eval_iters": 2,
    "full_validation": False,
    "multiple_validation_sets": False,
    "split": "90,10,0",
    "test_data_path": None,
    "micro_batch_size": 2,
    "eval_micro_batch_size": 2,
    "eval_global_batch_size": 8,
    "data_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "microbatch_group_size_per_vp_stage": None,
    "tp_comm_overlap": False,
}
INTERLEAVED = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
FULL = {"full_validation": True, "multiple_validation_sets": True}
TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}


def check(**changes):
    assert changes.keys() <= FITTING.keys()
    refuse(Namespace(**{**FITTING, **changes}), EVALUATION)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**TENSOR, "eval_micro_batch_size": 1},
        FULL,
        {**FULL, **TENSOR, "eval_micro_batch_size": 1},
        {**FULL, **PIPELINE, "eval_micro_batch_size": 1, "split": None},
        INTERLEAVED,
        {**INTERLEAVED, "eval_global_batch_size": 2, "eval_iters": 0},
    ],
)
def test_what_fits_is_left_alone(changes):
    check(**changes)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tp_comm_overlap": True, "eval_micro_batch_size": 1}, "--tp-comm-overlap has buffers for"),
        ({"full_validation": True}, "give --multiple-validation-sets too"),
        ({**FULL, "split": "969, 30, 1"}, "give --split with a last share of 0"),
        ({**FULL, "split": None, "test_data_path": ["test"]}, "no --test-data-path"),
        ({**FULL, **TENSOR}, "would expect 2; give --eval-micro-batch-size 1"),
        ({**FULL, **PIPELINE}, "would expect 2; give --eval-micro-batch-size 1"),
        ({**INTERLEAVED, "eval_global_batch_size": 4}, "has 2 micro-batches .* give it a multiple of 4"),
        ({**INTERLEAVED, "eval_global_batch_size": 12}, "has 6 micro-batches .* give it a multiple of 4"),
    ],
)
def test_what_would_fail_at_the_first_evaluation_is_refused(changes, error):
    with pytest.raises(UsageError, match=error):
        check(**changes)
