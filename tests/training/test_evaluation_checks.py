"""Data and batches of evaluation that would fail at the first one are refused before training."""

import json
from argparse import Namespace

import pytest
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split

from megatron_periln.data.split import shares
from megatron_periln.errors import UsageError
from megatron_periln.rules import refuse
from megatron_periln.training.evaluation_checks import EVALUATION, why_no_validation

FITTING = {
    "eval_iters": 2,
    "full_validation": False,
    "multiple_validation_sets": False,
    "skip_train": False,
    "split": "90,10,0",
    "data_path": ["data"],
    "data_args_path": None,
    "train_data_path": None,
    "valid_data_path": None,
    "test_data_path": None,
    "per_split_data_args_path": None,
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
BY_PART = {"data_path": None, "split": None, "train_data_path": ["a"], "valid_data_path": ["b"]}
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
        {**FULL, **PIPELINE, "eval_micro_batch_size": 1, **BY_PART, "test_data_path": ["1", "a"]},
        {"full_validation": True, "split": "969, 30, 1"},
        {"full_validation": True, "data_path": None, "split": None},
        {**FULL, **BY_PART, "train_data_path": ["1", "a", "2", "b"], "valid_data_path": ["a", "b"]},
        {"data_path": None, "split": None},
        {"split": "'99,1,0'"},
        {"split": "100,0,0"},
        {"split": "100,0,0", **INTERLEAVED, "eval_global_batch_size": 4},
        {"split": "0,0,1", "skip_train": True},
        {**BY_PART, "valid_data_path": None},
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
        ({**FULL, "data_path": ["0.3", "a", "0.7", "b"]}, "leaves no use for weights"),
        ({**FULL, **BY_PART, "valid_data_path": ["1", "a"]}, "leaves no use for weights"),
        ({**FULL, "split": "1,0,0"}, "--full-validation has nothing to evaluate; give --split with a second"),
        ({**FULL, **BY_PART, "valid_data_path": None}, "--full-validation has nothing to evaluate"),
        ({"split": "1,a,2"}, "--split 1,a,2 is not three shares such as 969,30,1"),
        ({"split": "0,100,0"}, "there are no data to train on; give --split with a first share"),
        ({**BY_PART, "train_data_path": None}, "no data to train on; .* or --train-data-path"),
        ({**BY_PART, "split": "99,1,0"}, "--split divides --data-path; drop it, or --train-data-path"),
        ({"data_path": None, "data_args_path": "file", "split": None}, "--data-args-path needs --split"),
        ({**FULL, **TENSOR}, "would expect 2; give --eval-micro-batch-size 1"),
        ({**FULL, **PIPELINE}, "would expect 2; give --eval-micro-batch-size 1"),
        ({**INTERLEAVED, "eval_global_batch_size": 4}, "has 2 micro-batches .* give it a multiple of 4"),
        ({**INTERLEAVED, "eval_global_batch_size": 12}, "has 6 micro-batches .* give it a multiple of 4"),
    ],
)
def test_what_would_fail_at_the_first_evaluation_is_refused(changes, error):
    with pytest.raises(UsageError, match=error):
        check(**changes)


@pytest.mark.parametrize(
    "split",
    [
        "969,30,1",
        " 969, 30,1 ",
        "'99,1,0'",
        '"99,1"',
        "[99, 1, 0]",
        "100",
        "1,0,0",
        ".9,.1,0.0",
        "99990,8,2",
        "9/1",
    ],
)
def test_shares_are_those_that_megatron_reads(split):
    total = sum(shares(split))
    assert [share / total for share in shares(split)] == pytest.approx(parse_and_normalize_split(split))


@pytest.mark.parametrize("split", ["", "a", "1,a,2", "1e-3,1", "99,1,-1", "1,2,3,4", "0,0,0", "1.2.3", "."])
def test_what_are_no_shares(split):
    assert shares(split) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split": "100,0,0"}, "--split 100,0,0 leaves nothing for validation"),
        ({"split": "'100,0,0'"}, "--split '100,0,0' leaves nothing for validation"),
        ({"split": "90,0,10"}, "--split 90,0,10 leaves nothing for validation"),
        ({"split": "100"}, "--split 100 leaves nothing for validation"),
        ({**BY_PART, "valid_data_path": None}, "--valid-data-path is not given"),
        (
            {**BY_PART, "train_data_path": None, "per_split_data_args_path": True},
            "{file} names nothing for valid",
        ),
        ({"split": "99,1,0"}, None),
        ({"split": "100,0,0", "eval_iters": 0}, None),
        ({"data_path": None, "split": "100,0,0"}, None),  # mock data
        (BY_PART, None),
    ],
)
def test_why_there_is_no_validation(tmp_path, changes, reason):
    file = tmp_path / "parts.json"
    file.write_text(json.dumps({"train": ["a"], "valid": None, "test": None}))
    if changes.get("per_split_data_args_path"):
        changes = {**changes, "per_split_data_args_path": str(file)}
    found = why_no_validation(Namespace(**{**FITTING, **changes}))
    assert found == (reason and reason.format(file=file))
