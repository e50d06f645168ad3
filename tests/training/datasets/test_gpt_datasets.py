"""``check_data`` finds every dataset on the command line."""

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_periln.data.indexed.format import check_indexed_dataset
from megatron_periln.data.indexed.sidecar import Sidecar, sidecar_path
from megatron_periln.errors import UsageError
from megatron_periln.training.datasets import gpt_datasets
from megatron_periln.training.datasets.gpt_datasets import check_data

FLAGS = (
    "data_path",
    "data_args_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "per_split_data_args_path",
    "per_dataset_sequences_path",
)


def arguments(**given):
    return Namespace(**{**dict.fromkeys(FLAGS), "mock_data": False, "split": None, **given})


@pytest.fixture
def good(indexed_bytes):
    return str(indexed_bytes)


@pytest.fixture
def other(indexed_bytes, tmp_path):
    """A second dataset."""
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{indexed_bytes}{suffix}", tmp_path / f"other{suffix}")
    return str(tmp_path / "other")


@pytest.fixture(params=["--data-path", "weighted", "file", "training", "validation", "test", "file by split"])
def named(request, good, tmp_path):
    """Returns arguments that name a dataset in one of the ways there are, beside good ones."""

    def arguments_naming(prefix):
        blend, file = [good, prefix], tmp_path / "blend"
        splits = {split: [good] for split in ("train", "valid", "test")}
        match request.param:
            case "--data-path":
                return arguments(data_path=blend)
            case "weighted":
                return arguments(data_path=["0.3", good, "0.7", prefix])
            case "file":
                file.write_text(f"0.3 {good}\n0.7 {prefix}\n")
                return arguments(data_args_path=str(file))
            case "file by split":
                file.write_text(json.dumps({**splits, "valid": f"0.3 {good} 0.7 {prefix}"}))
                return arguments(per_split_data_args_path=str(file))
            case split:
                splits[{"training": "train", "validation": "valid"}.get(split, split)] = blend
                return arguments(**{f"{split}_data_path": paths for split, paths in splits.items()})

    return arguments_naming


def test_good_datasets_pass(named, other):
    check_data(named(other))


def test_missing_dataset_is_found(named, other):
    with pytest.raises(UsageError) as error:
        check_data(named(other[:-1]))
    assert str(error.value).startswith(f"{other[:-1]}: no such dataset")
    assert f"did you mean {other}?" in str(error.value)


def test_half_a_dataset_is_found(good, other):
    Path(f"{other}.bin").unlink()
    with pytest.raises(UsageError, match=r"other\.bin: no such file, though other\.idx is there"):
        check_data(arguments(data_path=[good, other]))


def test_suffix_in_the_prefix_is_found(good):
    with pytest.raises(UsageError, match="takes the prefix without .bin/.idx: use " + good):
        check_data(arguments(data_path=[f"{good}.bin"]))


def test_no_data_is_refused_but_mock_data_are_enough():
    with pytest.raises(UsageError, match="no data: give --data-path PREFIX"):
        check_data(arguments())
    check_data(arguments(mock_data=True))


@pytest.mark.parametrize("split", ["90,5,5", "100,0,0", "1", "'90,10,0'"])
def test_splits_with_sequences_pass(good, split):
    check_data(arguments(data_path=[good], split=split))


@pytest.mark.parametrize("split, part", [("999,0.5,0.5", "validation"), ("0.1,50,50", "training")])
def test_split_that_leaves_a_part_empty_is_refused(good, split, part):
    with pytest.raises(UsageError) as error:
        check_data(arguments(data_path=[good], split=split))
    assert f"--split {split} leaves no sequence of {good} (60 in all) for {part}" in str(error.value)
    assert str(error.value).endswith("give that part a larger share" + ", or 0" * (part != "training"))


def test_split_leaves_enough_of_every_dataset(good, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "short.bin"))
    builder.add_document([1, 2, 3], [3])
    builder.finalize(str(tmp_path / "short.idx"))
    with pytest.raises(UsageError, match=r"short \(1 in all\) for validation"):
        check_data(arguments(data_path=[good, str(tmp_path / "short")], split="90,5,5"))


@pytest.mark.parametrize(
    ("kind", "ids", "said"),
    [
        ("HuggingFaceTokenizer", 1000, ""),
        ("HuggingFaceTokenizer", 900, "warning: {} was made with HuggingFaceTokenizer, of 1,000 ids; this"),
        ("SentencePieceTokenizer", 1000, "warning: {} was made with HuggingFaceTokenizer"),
        ("NullTokenizer", 900, ""),
    ],
)
def test_another_tokenizer_is_told(made_with_1000_ids, monkeypatch, capsys, kind, ids, said):
    monkeypatch.setattr(gpt_datasets, "get_tokenizer", lambda: Namespace(vocab_size=ids))
    check_data(arguments(data_path=[made_with_1000_ids], tokenizer_type=kind, padded_vocab_size=1024))
    out = capsys.readouterr().out
    assert out.startswith(said.format(made_with_1000_ids)) and bool(out) == bool(said)


def test_ids_that_the_model_lacks_are_an_error(made_with_1000_ids, monkeypatch):
    monkeypatch.setattr(gpt_datasets, "get_tokenizer", lambda: Namespace(vocab_size=900))
    with pytest.raises(UsageError, match="of 1,000 ids, and this run's model has 896; give the tokenizer"):
        check_data(
            arguments(data_path=[made_with_1000_ids], tokenizer_type="NullTokenizer", padded_vocab_size=896)
        )


@pytest.fixture
def made_with_1000_ids(other):
    tokenizer = {"type": "HuggingFaceTokenizer", "digest": None, "vocab_size": 1000, "eod": 0, "encoder": "x"}
    info = check_indexed_dataset(other)
    counts = {"documents": 1, "sequences": info.sequences, "tokens": 1, "bytes_read": 1, "skipped": {}}
    about = {
        "inputs": [],
        "dtype": str(info.dtype),
        "append_eod": True,
        "json_key": "text",
        "versions": {},
        "command": [],
    }
    sha256 = {"bin": "0", "idx": "0"}
    Sidecar(**counts, **about, tokenizer=tokenizer, sha256=sha256, created="").write(sidecar_path(other))
    return other


def test_a_sidecar_of_what_was_here_before_is_none(made_with_1000_ids):
    path = sidecar_path(made_with_1000_ids)
    replace(Sidecar.read(path), sequences=10**6).write(path)
    check_data(arguments(data_path=[made_with_1000_ids], tokenizer_type="x", padded_vocab_size=896))


def test_lengths_of_datasets_that_are_right_pass(good, monkeypatch, tmp_path):
    monkeypatch.setattr(gpt_datasets, "get_tokenizer", lambda: Namespace(vocab_size=257))
    (tmp_path / "lengths").write_text(json.dumps({good: [60, 61]}))
    check_data(arguments(data_path=[good], per_dataset_sequences_path=str(tmp_path / "lengths")))


@pytest.mark.parametrize(
    ("lengths", "ids", "expected"),
    [
        ('{"GOOD": [50, 51]}', 257, "says [50, 51] of GOOD, which has [60, 61], sequences and document ends"),
        ('{"other": [60, 61]}', 257, "says None of GOOD, which has [60, 61], sequences and document ends"),
        ('{"GOOD": [60, 61]}', 70_000, "GOOD holds uint16, which Megatron then reads as int32, by the size"),
        ("[]", 257, "not a JSON object of prefixes"),
        ("{", 257, "cannot be read: Expecting property name"),
    ],
)
def test_lengths_of_datasets_that_are_wrong_are_refused(good, monkeypatch, tmp_path, lengths, ids, expected):
    """Of a corpus that grew, Megatron would read some of the pointers as lengths."""
    monkeypatch.setattr(gpt_datasets, "get_tokenizer", lambda: Namespace(vocab_size=ids))
    (tmp_path / "lengths").write_text(lengths.replace("GOOD", good))
    with pytest.raises(UsageError) as error:
        check_data(arguments(data_path=[good], per_dataset_sequences_path=str(tmp_path / "lengths")))
    assert str(error.value).startswith(f"--per-dataset-sequences-path {tmp_path / 'lengths'}")
    assert expected.replace("GOOD", good) in str(error.value)


def test_datasets_in_object_storage_are_left_to_megatron(good):
    check_data(arguments(data_path=[good, "s3://bucket/text"]))
