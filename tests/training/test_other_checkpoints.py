"""Checkpoints of another placement are refused; those of stock Megatron are Pre-LN's."""

import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_periln.checkpoints.saved_arguments import checkpoint_path, saved_arguments
from megatron_periln.errors import UsageError
from megatron_periln.megatron_arguments import megatron_arguments
from megatron_periln.norms import PERI, PLACEMENTS
from megatron_periln.training.parsing import add_arguments
from megatron_periln.training.placement_checkpoint import (
    _refuse_another,
    _refuse_other_structure,
    refuse_other_placement,
)
from tests.training.model import MODEL

OTHER = {"pre": "peri", "post": "pre", "peri": "output", "output": "post"}


def structure(placement):
    return PLACEMENTS[placement].structure()


def checkpoints(job):
    return job.folder / "checkpoints"


@pytest.fixture(scope="module")
def continued(jobs):
    """Continue from a job's checkpoint for one iteration more."""

    def run(name, job, arguments, **options):
        more = f"--train-iters 7 --override-opt-param-scheduler --load {checkpoints(job)}"
        return jobs.run(f"continued-{name}", f"{MODEL} {more} {arguments}", **options)

    return run


def norms(weights):
    return {name for name in weights if "norm" in name and not name.startswith("optimizer")}


@pytest.mark.parametrize("saved, asked", OTHER.items())
def test_another_placement_is_refused(trained, refused, saved, asked):
    folder = checkpoints(trained(saved))
    error = refused(f"{saved}-as-{asked}", f"--norm-placement {asked} --load {folder}")
    assert str(folder) in error
    assert f"has norm placement {structure(saved)}, and this run asks for {structure(asked)}" in error
    assert f"give --norm-placement {saved}" in error


def test_another_placement_is_refused_at_a_given_iteration(trained, refused, tmp_path):
    shutil.copytree(checkpoints(trained("peri")) / "iter_0000006", tmp_path / "iter_0000006")
    error = refused("given-iteration", f"--norm-placement pre --load {tmp_path} --ckpt-step 6")
    assert f"has norm placement {structure('peri')}" in error


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_another_embedding_norm_is_refused(trained, refused, flag):
    folder = checkpoints(trained("peri"))
    error = refused(f"embedding{flag}", f"--norm-placement peri --no-embedding-norm {flag} {folder}")
    assert "peri (with embedding norm), and this run asks for peri (without embedding norm)" in error
    assert "give --norm-placement peri --embedding-norm to continue it" in error
    assert f"another {flag} " in error


def test_stock_checkpoint_is_refused_by_peri(stock, refused):
    error = refused("stock-as-peri", f"--norm-placement peri --load {checkpoints(stock)}")
    assert f"{checkpoints(stock)}, written by stock Megatron, has norm placement pre" in error


def test_stock_checkpoint_continues_as_pre(stock, trained, continued):
    """Strictly too: Megatron called every checkpoint, its own included, one with keys too many."""
    strictly = "--norm-placement pre --dist-ckpt-strictness raise_all"
    curve = continued("stock-as-pre", stock, strictly).curve
    assert [point["iteration"] for point in curve] == [7]
    assert curve == continued("pre", trained("pre"), "--norm-placement pre").curve


def test_pre_checkpoint_continues_in_stock_megatron(stock, trained, continued):
    """Megatron's own model and functions load it, strictly, as they load their own."""
    changes = ["tests.training.stock.use_stock_model"]
    ours = continued("pre-in-stock", trained("pre"), "--norm-placement pre", changes=changes)
    theirs = continued("stock-in-stock", stock, "--norm-placement pre", changes=changes)
    assert [point["iteration"] for point in ours.curve] == [7]
    assert ours.curve == theirs.curve


def test_a_checkpoint_of_other_weights_is_refused_by_strict_loading(trained, jobs):
    folder = checkpoints(trained("peri"))
    flags = f"--norm-placement peri --qk-layernorm --allow-model-changes --load {folder}"
    job = jobs.run("strictly", f"{MODEL} {flags} --dist-ckpt-strictness raise_all", succeeds=False)
    (line,) = [line for line in job.log.splitlines() if line.startswith("error:")]
    assert line.startswith("error: Megatron refuses the checkpoint: Unexpected keys (not found")
    assert "self_attention.q_layernorm.weight" in line
    assert "Traceback" not in job.log


@pytest.mark.parametrize("saved, asked", [("post", "peri"), ("peri", "pre")])
def test_placement_is_adopted_from_the_checkpoint(trained, continued, saved, asked):
    job = continued(
        f"{saved}-adopted-by-{asked}", trained(saved), f"--norm-placement {asked} --use-checkpoint-args"
    )
    assert norms(job.weights(7)) == norms(trained(saved).weights(6))
    assert job.curve == continued(saved, trained(saved), f"--norm-placement {saved}").curve


def test_a_placement_that_is_adopted_must_fit_the_flags(trained, refused):
    flags = "--norm-placement peri --fuse-pre-mlp-norm --use-checkpoint-args"
    error = refused("adopted-mismatch", f"{flags} --load {checkpoints(trained('pre'))}")
    assert "--fuse-pre-mlp-norm: --norm-placement pre has not both norms; drop one of them" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--output-norm-epsilon 1e-1", "epsilon of 1e-05, and this run asks for 0.1"),
        (
            """--norm-rule '{"norms": {"input": {"epsilon": 0.1}}}'""",
            "an input norm epsilon of 1e-05, .* asks for 0.1; give --norm-rule with input's epsilon 1e-05",
        ),
        ("--freeze-output-norm", "without --freeze-output-norm, .*drop that flag"),
    ],
)
def test_another_output_norm_is_refused_where_it_would_go_on(trained, refused, continued, flags, message):
    flags = f"--norm-placement peri {flags}"
    name = flags.split()[2].strip("-")
    error = refused(f"other-{name}", f"{flags} --load {checkpoints(trained('peri'))}")
    assert re.search(message, error)
    fresh = continued(f"fresh-{name}", trained("peri"), f"{flags} --finetune")
    assert [point["iteration"] for point in fresh.curve] == [1, 2, 3, 4, 5, 6, 7]


def test_a_pretrained_checkpoint_counts_until_there_is_one_of_the_run(trained, jobs):
    """Megatron reads it at the start alone; what it is doesn't matter when the run goes on."""
    folder, pretrained = checkpoints(trained("peri")), checkpoints(trained("pre"))
    job = jobs.run(
        "goes-on",
        f"{MODEL} --norm-placement peri --train-iters 7 --override-opt-param-scheduler --load {folder} "
        f"--pretrained-checkpoint {pretrained}",
    )
    assert [point["iteration"] for point in job.curve] == [7]


@pytest.mark.parametrize("more", ["", "--finetune"])
def test_weights_stored_otherwise_are_refused(trained, refused, more):
    """Megatron's --use-checkpoint-args leaves that flag as it is."""
    flags = f"--norm-placement peri --apply-layernorm-1p {more} --load {checkpoints(trained('peri'))}"
    error = refused(f"one-less{more}", flags)
    assert (
        "was trained without --apply-layernorm-1p, which stores each norm weight less 1; drop that flag"
        in error
    )


@pytest.fixture(scope="module")
def sharded(trained, tmp_path_factory):
    """A checkpoint with arguments of a Peri-LN run, as torch_dcp and fsdp_dtensor lay it out."""
    load = Namespace(load=str(checkpoints(trained("peri"))), ckpt_step=None)
    folder = tmp_path_factory.mktemp("sharded")
    state = {"args": saved_arguments(load), "iteration": 6, "model": {"weight": torch.zeros(3)}}
    dcp.save(state, checkpoint_id=folder / "iter_0000006", no_dist=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("6")
    return folder


def test_another_placement_is_refused_in_every_format(sharded, refused):
    error = refused("sharded", f"--norm-placement pre --ckpt-format torch_dcp --load {sharded}")
    assert f"has norm placement {structure('peri')}, and this run asks for {structure('pre')}" in error


def test_a_sharded_checkpoint_without_arguments_is_left_to_megatron(tmp_path):
    dcp.save({"model": {"weight": torch.zeros(3)}}, checkpoint_id=tmp_path / "iter_0000006", no_dist=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("6")
    assert saved_arguments(Namespace(load=str(tmp_path), ckpt_step=None)) is None


@pytest.mark.parametrize("no_optimizer", [{"iteration": "release"}, {"no_save_optim": True}], ids=str)
def test_weights_may_be_frozen_where_there_is_no_optimizer_state(tmp_path, no_optimizer):
    """And an older Megatron, which names the epsilon otherwise, is read too."""
    named = no_optimizer.pop("iteration", "5")
    folder = tmp_path / (named if named == "release" else "iter_0000005") / "mp_rank_00"
    folder.mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(named)
    saved = Namespace(norm_epsilon=1e-5, norm_placement="peri", embedding_norm=True, **no_optimizer)
    torch.save({"args": saved}, folder / "model_optim_rng.pt")
    args = Namespace(load=str(tmp_path), pretrained_checkpoint=None, ckpt_step=None, finetune=False)
    args.no_load_optim, args.layernorm_zero_centered_gamma, args.layernorm_epsilon = None, False, 1e-5
    refuse_other_placement(args, PERI.with_options(freeze_output_norm=True))
    refuse_other_placement(args, PERI.with_options(output_norm_epsilon=1e-5))
    with pytest.raises(UsageError, match=r"epsilon of 1e-05, and this run asks for 0\.001"):
        refuse_other_placement(args, PERI.with_options(output_norm_epsilon=1e-3))
    del saved.norm_placement
    torch.save({"args": saved}, folder / "model_optim_rng.pt")
    with pytest.raises(UsageError, match="written by stock Megatron"):
        refuse_other_placement(args, PERI)


def test_arguments_are_read_once_until_they_are_saved_anew(tmp_path, monkeypatch):
    file, load, read = tmp_path / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt", torch.load, []
    file.parent.mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    monkeypatch.setattr(torch, "load", lambda path, **how: read.append(path) or load(path, **how))
    args = Namespace(load=str(tmp_path), ckpt_step=None)
    for epsilon in (1e-5, 1e-6):
        torch.save({"args": Namespace(norm_epsilon=epsilon)}, file)
        for _ in range(2):
            saved = saved_arguments(args)
            assert saved.norm_epsilon == epsilon
            saved.norm_epsilon = 1  # whoever changes it changes it for nobody else
    assert read == [file, file]


@pytest.mark.parametrize("distributed", [True, False])
def test_another_layout_of_the_optimizer_is_refused(trained, distributed):
    """Megatron ends in a traceback, or in a list of all tensors."""
    words = f"{MODEL} --norm-placement peri --load {checkpoints(trained('peri'))}"
    args = megatron_arguments(words.split(), add_arguments)
    path = checkpoint_path(args)
    saved = saved_arguments(args)
    args.use_distributed_optimizer, saved.use_distributed_optimizer = distributed, not distributed
    was, other = ("without", "drop") if distributed else ("with", "give")
    message = f"was trained {was} --use-distributed-optimizer, .*; {other} that flag"
    with pytest.raises(UsageError, match=message):
        _refuse_another(args, "load", path, saved, PERI)
    for changed in ({"no_load_optim": True}, {"finetune": True}, {"optimizer": "muon"}):
        same = Namespace(**vars(args) | changed)
        _refuse_another(same, "load", path, saved, PERI)


def test_nothing_to_load_is_nothing_to_refuse(jobs):
    job = jobs.run("load-nothing", f"{MODEL} --exit-interval 1 --load {jobs.folder / 'absent'}")
    assert [point["iteration"] for point in job.curve] == [1]


@pytest.mark.parametrize(
    ("name", "tracker", "arguments", "message"),
    [
        ("garbage-tracker", "abc", "", "names no iteration but 'abc'; write the number of one into it"),
        ("lost-iteration", "9", "", "there is no iter_0000009, but 6; correct latest_checkpointed_iteration"),
        ("unknown-step", "6", "--ckpt-step 99", "no iter_0000099, but 6; give another --ckpt-step"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_an_error(refused, tmp_path, name, tracker, arguments, message):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    (tmp_path / "iter_0000006").mkdir()
    assert message in refused(name, f"--load {tmp_path} {arguments}")


def test_the_folder_of_one_checkpoint_is_refused(trained, refused):
    folder = checkpoints(trained("peri")) / "iter_0000006"
    assert f"--load {folder} is one checkpoint; give the folder above it" in refused(
        "one-checkpoint", f"--load {folder}"
    )


def test_another_schedule_is_explained(trained, jobs):
    load = f"--load {checkpoints(trained('peri'))} --train-iters 9"
    job = jobs.run("other-schedule", f"{MODEL} {load}", succeeds=False)
    assert job.exit_codes == [1]
    assert "error: the checkpoint was trained with another schedule" in job.log
    assert "give --override-opt-param-scheduler to follow the flags" in job.log


def test_another_rule_is_refused_with_the_flags_of_its_own():
    rule = PERI.changed({"residual_scale": [0.5, 1.0]})
    with pytest.raises(UsageError) as error:
        _refuse_other_structure("load", Path("runs/a/iter_1"), PERI, rule, "")
    assert (
        "the checkpoint in runs/a has norm placement peri, residual scale [0.5, 1.0] (with embedding norm), "
        "and this run asks for peri (with embedding norm); give --norm-placement peri --norm-rule "
        """'{"residual_scale": [0.5, 1.0]}' --embedding-norm to continue it"""
    ) in str(error.value)
    _refuse_other_structure("load", Path("runs/a/iter_1"), rule, rule, "")
