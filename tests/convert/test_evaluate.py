"""tools/evaluate.py measures checkpoints and exported models alike."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.convert import checkpoints


@pytest.fixture(scope="module")
def tool():
    return importlib.import_module("megatron_periln.tools.evaluate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The prefix of a dataset, and its tokens."""
    prefix = str(tmp_path_factory.mktemp("data") / "tokens")
    tokens = checkpoints.sample(1, 200)[0]
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(tokens.tolist(), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix, tokens


def test_checkpoint_and_export_have_the_same_loss(saved, exported, data, tool, capsys):
    prefix, tokens = data
    flags = ["--data-path", prefix, "--seq-length", "32", "--windows", "4"]
    losses = []
    for model in (["--load", str(saved("peri").folder)], ["--model", str(exported("peri")[0])]):
        assert tool.main([*model, *flags]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.endswith(" 128 tokens")
        losses.append(float(line.split()[0]))
    windows = torch.stack([tokens[start : start + 33] for start in (0, 32, 64, 96)])
    logits = saved("peri").logits(windows[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert losses == [pytest.approx(expected, abs=2e-6)] * 2


def test_a_window_is_as_long_as_the_model_allows(saved, exported, data, tool, capsys):
    for model in (["--load", str(saved("peri").folder)], ["--model", str(exported("peri")[0])]):
        assert tool.main([*model, "--data-path", data[0], "--windows", "2"]) == 0
        assert capsys.readouterr().out.splitlines()[-1].endswith(f" {2 * checkpoints.POSITIONS} tokens")


def test_a_dataset_of_another_tokenizer_is_refused(saved, exported, tool, tmp_path, capsys):
    largest = checkpoints.VOCABULARY
    builder = IndexedDatasetBuilder(str(tmp_path / "other.bin"), dtype=np.uint16)
    builder.add_document([1] * 100 + [largest] * 100, [200])
    builder.finalize(str(tmp_path / "other.idx"))
    for model in (["--load", str(saved("peri").folder)], ["--model", str(exported("peri")[0])]):
        assert tool.main([*model, "--data-path", str(tmp_path / "other"), "--seq-length", "32"]) == 1
        assert capsys.readouterr().err.splitlines() == [
            f"error: {tmp_path / 'other'} has the token id {largest}, and the model's vocabulary has "
            f"{largest}; give a dataset that the model's own tokenizer made"
        ]


def test_the_clamp_acts_where_it_did_in_training(single_process, saved, data, tool, tmp_path, capsys):
    """Megatron's fused SwiGLU, its default, does not clamp; SwiGLU without the fusion does."""
    losses = {}
    for name, flags in {
        "without": "",
        "fused": "--activation-func-clamp-value 0.1",
        "not fused": "--activation-func-clamp-value 0.1 --no-bias-swiglu-fusion",
    }.items():
        model = checkpoints.save(tmp_path / name, f"{checkpoints.COMMON} {flags}")
        assert tool.main(["--load", str(model.folder), "--data-path", data[0], "--seq-length", "32"]) == 0
        losses[name] = float(capsys.readouterr().out.splitlines()[-1].split()[0])
    assert losses["fused"] == losses["without"]
    assert abs(losses["not fused"] - losses["without"]) > 0.1


def test_what_one_process_computes_otherwise_is_refused(single_process, data, tool, tmp_path, capsys):
    flags = f"{checkpoints.COMMON} --activation-func-clamp-value 0.1"
    model = checkpoints.save(tmp_path, flags, use_te_activation_func=True, bias_swiglu_fusion=False)
    assert tool.main(["--load", str(model.folder), "--data-path", data[0]]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: --load {tmp_path}: one process can't compute this model as it was trained"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data-path", "x"], "give --load CHECKPOINT or --model FOLDER, one of them"),
        (["--load", "x", "--model", "y", "--data-path", "z"], "one of them"),
        (["--load", "x"], "give --data-path PREFIX for the loss, or --tasks"),
        (["--load", "x", "--tasks", "paper"], "--tasks needs an exported model; run tools/export_hf.py"),
        (["--load", "x", "--data-path", "absent"], "absent: no such dataset"),
    ],
)
def test_bad_input_is_one_clear_error(tool, capsys, arguments, message):
    assert tool.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert message in error
