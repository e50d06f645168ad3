"""Output norms for a Pre-LN checkpoint: only when asked for, with the weights that fit best."""

import importlib

import pytest
import torch

from megatron_periln.checkpoints.manifest import Manifest
from megatron_periln.checkpoints.reader import Checkpoint
from megatron_periln.convert.warm_start import calibrated_output_norms, insert_output_norms
from megatron_periln.errors import UsageError
from megatron_periln.models.one_process import build_model, load_model, megatron_config
from megatron_periln.norms import OutputNorm
from tests.convert import checkpoints

MODEL = """--num-layers 4 --group-query-attention --num-query-groups 2 --normalization RMSNorm --swiglu
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
    --norm-placement pre --train-iters 24 --save-interval 24 --lr 1e-2"""


@pytest.fixture(scope="module")
def trained(jobs):
    return jobs.run("pre-for-a-warm-start", MODEL)


@pytest.fixture(scope="module")
def tool():
    return importlib.import_module("megatron_periln.tools.warm_start")


@pytest.fixture(scope="module")
def inserted(trained, jobs, single_process, tmp_path_factory):
    """The folder of a warm start, what it said, and the losses before and after."""
    said, folder = [], tmp_path_factory.mktemp("warm") / "start"
    losses = insert_output_norms(trained.folder / "checkpoints", folder, str(jobs.data), say=said.append)
    return folder, said, losses


def test_loss_before_and_after_is_reported_with_a_warning(inserted):
    _, said, (before, after) = inserted
    assert said[0] == f"Loss of the Pre-LN model: {before}"
    assert said[3] == f"With calibrated weights: {after}"
    ones, fitted = (float(line.split(": ")[1].split()[0]) for line in said[1:3])
    assert abs(fitted - before.nats) < 0.2
    assert after.nats < min(ones, fitted)
    assert after.nats < before.nats + 0.02
    assert after.tokens == 32 * 64  # windows of the checkpoint's own length
    assert said[4].startswith("Warning: this is another model")


def test_everything_but_the_new_weights_is_kept(trained, inserted):
    before, after = Checkpoint(trained.folder / "checkpoints"), Checkpoint(inserted[0])
    assert after.args.norm_placement == "peri"
    for layer in range(4):
        for name in ("self_attention.linear_qkv.weight", "mlp.linear_fc2.weight"):
            assert torch.equal(before.read(name, layer), after.read(name, layer))
    weights = torch.stack([after.read("mlp_bda.norm.weight", layer) for layer in range(4)])
    assert (weights != 1).all()


def test_the_checkpoint_has_a_manifest(inserted):
    path = inserted[0] / "release"
    manifest = Manifest.read(path)
    assert manifest.has_sums
    manifest.check_sums(path)


def test_training_goes_on(inserted, jobs):
    model = MODEL.replace("--norm-placement pre", "--norm-placement peri --no-embedding-norm")
    job = jobs.run("after-a-warm-start", f"{model} --train-iters 2 --load {inserted[0]}")
    assert [point["iteration"] for point in job.curve] == [1, 2]
    assert job.curve[0]["lm loss"] < inserted[2][1].nats + 0.5


def test_weights_are_the_least_squares_fit(single_process):
    flags = checkpoints.COMMON + checkpoints.UNTIED + "--norm-placement peri"
    model = checkpoints.randomize(build_model(megatron_config(checkpoints.arguments(flags))))
    norm = next(module for module in model.modules() if isinstance(module, OutputNorm))
    output = torch.randn(12, 2, 64) * torch.rand(12, 2, 1) * torch.rand(64)
    residual = torch.zeros(12, 2, 64)
    with torch.no_grad(), calibrated_output_norms(model):
        added = norm(output, None, residual, 0.0, False)
    normed = (output / (output.square().mean(-1, keepdim=True) + norm.eps).sqrt()).flatten(0, 1)
    fits = [
        torch.linalg.lstsq(
            normed[:, c : c + 1].double(), output.flatten(0, 1)[:, c : c + 1].double()
        ).solution
        for c in range(64)
    ]
    torch.testing.assert_close(norm.weight.double(), torch.cat(fits)[:, 0].double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(added.flatten(0, 1), normed * norm.weight, rtol=1e-5, atol=1e-6)


def test_it_is_refused_unless_asked_for(trained, jobs, tool, tmp_path, capsys):
    load = trained.folder / "checkpoints"
    code = tool.main(
        ["--load", str(load), "--output", str(tmp_path / "start"), "--data-path", str(jobs.data)]
    )
    assert code == 1
    assert "give --insert-output-norms to have them all the same" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_only_pre_ln_is_given_norms(inserted, jobs, tmp_path):
    with pytest.raises(UsageError, match=r"has norm placement peri .*only pre can be given norms"):
        insert_output_norms(inserted[0], tmp_path / "again", str(jobs.data), 64, say=lambda _: None)


def test_loaded_model_is_the_one_measured(inserted, single_process):
    checkpoint = Checkpoint(inserted[0])
    model = load_model(checkpoint.path, megatron_config(checkpoint.args))
    weight = next(m for m in model.modules() if isinstance(m, OutputNorm)).weight
    assert torch.equal(weight, checkpoint.read("self_attn_bda.norm.weight", 0))
