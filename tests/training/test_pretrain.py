"""Pretraining with each norm placement, and next to stock Megatron."""

import pytest
import torch
from megatron.core import dist_checkpointing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_periln.norms import PLACEMENTS
from tests.parallel.jobs import load_tensors
from tests.training.model import MODEL

FOUR = ("pre", "post", "peri", "output")
each_placement = pytest.mark.parametrize("placement", FOUR)


def last_checkpoint(job):
    return job.folder / "checkpoints" / "iter_0000006"


@each_placement
def test_loss_falls(trained, placement):
    losses = [iteration["lm loss"] for iteration in trained(placement).curve]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1


@each_placement
def test_validation_loss_is_printed(trained, placement):
    log = trained(placement).log
    assert "validation loss at iteration 3 | lm loss value: " in log
    assert "validation loss at iteration 6 on validation set | lm loss value: " in log


@each_placement
def test_losses_go_to_tensorboard(trained, placement):
    job = trained(placement)
    events = EventAccumulator(str(job.folder / "tensorboard")).Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("lm loss")]
    assert [step for step, _ in scalars] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in scalars] == pytest.approx([point["lm loss"] for point in job.curve], rel=1e-6)
    assert {event.step for event in events.Scalars("lm loss validation")} == {3, 6}


@each_placement
def test_checkpoint_says_which_placement_it_has(trained, placement):
    saved = dist_checkpointing.load_common_state_dict(str(last_checkpoint(trained(placement))))["args"]
    assert saved.norm_placement == placement
    assert saved.embedding_norm is PLACEMENTS[placement].embedding
    assert (saved.output_norm_init, saved.freeze_output_norm, saved.output_norm_epsilon) == (
        "ones",
        False,
        None,
    )


@each_placement
def test_checkpoint_holds_the_norms_of_its_placement(trained, placement):
    where = PLACEMENTS[placement]
    expected = {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": where.input,
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": where.input,
        "decoder.layers.self_attn_bda.norm.weight": where.output or where.after_add,
        "decoder.layers.mlp_bda.norm.weight": where.output or where.after_add,
        "decoder.final_layernorm.weight": where.final,
        "embedding.norm.weight": where.embedding,
    }
    saved = load_tensors(last_checkpoint(trained(placement)))
    norms = {name for name in saved if "norm" in name and not name.startswith("optimizer")}
    assert norms == {name for name, stands in expected.items() if stands}


def test_pre_is_bit_identical_to_stock_megatron(trained, stock):
    assert trained("pre").curve == stock.curve
    ours, theirs = (load_tensors(last_checkpoint(job)) for job in (trained("pre"), stock))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("placement", sorted(set(FOUR) - {"pre"}))
def test_other_placements_differ_from_stock_megatron(trained, stock, placement):
    assert trained(placement).curve != stock.curve
    assert (
        load_tensors(last_checkpoint(trained(placement))).keys()
        != load_tensors(last_checkpoint(stock)).keys()
    )


def test_stock_checkpoint_knows_nothing_of_placements(stock):
    saved = dist_checkpointing.load_common_state_dict(str(last_checkpoint(stock)))["args"]
    assert saved.num_layers == 2
    assert not hasattr(saved, "norm_placement")


def test_a_blend_trains_without_evaluation_and_reports_determinism(jobs, indexed_bytes):
    """Megatron refuses a blend's validation data of no sample, and doesn't know its own flag's value."""
    blend = f"--data-path 1 {indexed_bytes} 1 {indexed_bytes} --split 90,5,5 --eval-iters 0"
    flags = f"{MODEL} --norm-placement peri --train-iters 2 {blend} --rerun-mode report_stats"
    job = jobs.run("blend", flags)
    assert [point["iteration"] for point in job.curve] == [1, 2]
    assert "initialized in mode RerunMode.REPORT_DETERMINISM_STATS" in job.log


@pytest.mark.parametrize("blend", [True, False], ids=["blend", "one dataset"])
def test_data_without_a_share_for_validation_are_not_evaluated(jobs, indexed_bytes, blend):
    """Nor at the end; the test's share is. Quotes in ``--split`` are nothing to Megatron."""
    data = f"--data-path 1 {indexed_bytes} 1 {indexed_bytes}" if blend else ""
    flags = f"{MODEL} --norm-placement peri --train-iters 2 {data} --eval-iters 1 --eval-interval 1"
    split = "100,0,0" if blend else "\\'90,0,10\\'"
    job = jobs.run(f"unevaluated-{blend}", f"{flags} --split {split}")
    assert [point["iteration"] for point in job.curve] == [1, 2]
    assert "on validation set" not in job.log
    assert ("on test set" in job.log) == (not blend)
    said = "There is no evaluation while training:\n  --split {} leaves nothing for validation"
    assert job.log.count(said.format(split.replace("\\", ""))) == 1


def test_a_mixture_of_experts_starts_from_a_dense_checkpoint(jobs, trained):
    """Every expert is the dense MLP, and all else is the dense model's."""
    flags = "--norm-placement peri --num-experts 4 --moe-router-topk 2 --moe-use-upcycling --finetune"
    load = trained("peri").folder / "checkpoints"
    job = jobs.run("upcycled", f"{MODEL} {flags} --train-iters 2 --load {load}")
    dense = trained("peri").weights(6)
    sparse = {key.replace("mlp.experts.experts.", "mlp."): value for key, value in job.weights(1).items()}
    models = [key for key in dense if not key.startswith(("optimizer", "chained"))]
    assert any("mlp_bda.norm" in key for key in models) and any("linear_fc1" in key for key in models)
    for key in models:
        if key.endswith(("linear_fc1.weight", "linear_fc2.weight")):
            assert sparse[key].shape[1] == 4
            assert all(torch.equal(sparse[key][:, expert], dense[key]) for expert in range(4)), key
        else:
            assert torch.equal(sparse[key], dense[key]), key
    assert job.curve[-1]["lm loss"] < 5.3
