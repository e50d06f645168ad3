import pytest

from tests.parallel.cases import Case
from tests.parallel.compare import tensors_apart
from tests.parallel.conftest import FIRST, LAST

DISTRIBUTED = "distributed optimizer"
ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"


def convert(jobs, source, case):
    """Load the last checkpoint of ``source`` in the layout of ``case``; save it without a step."""
    load = source.folder / "checkpoints"
    name = f"convert-{source.folder.name}-{case.layout}"
    arguments = f"{case.model} {case.execution} --load {load} --no-load-rng --save-interval 1000"
    return jobs.run(name, arguments, case.ranks, changes=[SAVE_AS_LOADED])


SAVE_AS_LOADED = "tests.parallel.test_checkpoints.save_as_loaded"


def save_as_loaded():
    from megatron.training import training

    load = training.load_checkpoint

    def load_and_save(model, optimizer, scheduler, *args, **kwargs):
        loaded = load(model, optimizer, scheduler, *args, **kwargs)
        training.save_checkpoint(loaded[0], model, optimizer, scheduler, 0)
        raise SystemExit(0)

    training.load_checkpoint = load_and_save


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (Case("peri", layout="TP2"), "1"),
        (Case("peri", layout="TP2xPP2+SP"), "1"),
        (Case("peri"), "TP2xPP2+SP"),
        (Case("peri", layout="PP2"), "PP2xVPP2"),
        (Case("peri", layout="PP2xVPP2"), "TP2"),
        (Case("post", layout="TP2+SP"), "PP2"),
        (Case("output", layout="PP2xVPP2"), "1"),
        (Case("peri", "biased", "TP2xPP2+SP"), "1"),
        (Case("peri", layout="DP2", variant=DISTRIBUTED), "TP2"),
        (Case("peri", variant=DISTRIBUTED), "TP2xPP2+SP"),
        (Case("peri", "moe", "EP2", variant=DISTRIBUTED), "1"),
        (Case("peri", "moe", "EP2", variant=DISTRIBUTED), "EP2xTP2+SP"),
        (Case("peri", "mla", "TP2+SP"), "1"),
        (Case("peri", "mtp", "PP2"), "1"),
        (Case("peri", layout="TP2xPP2+SP", variant="muon"), "1"),
    ],
    ids=str,
)
def test_a_checkpoint_moves_to_another_layout_unchanged(run, jobs, saved, loaded):
    target = Case(saved.placement, saved.architecture, loaded, variant=saved.variant)
    before = run(saved).weights(LAST)
    after = convert(jobs, run(saved), target).weights(LAST)
    assert any("exp_avg_sq" in name for name in before)
    assert any("self_attn_bda.norm.weight" in name for name in before)
    assert max(tensors_apart(after, before, relative=False).values()) == 0


@pytest.mark.parametrize("variant", ["", DISTRIBUTED])
@pytest.mark.parametrize("saving", ["", ASYNC], ids=["", "async"])
def test_resuming_is_never_having_stopped(run, jobs, variant, saving):
    case = Case("peri", variant=variant)
    straight = run(case)
    load = straight.folder / "checkpoints"
    if saving:
        stopped = jobs.run(
            f"stop-{variant}-async".replace(" ", "-"),
            f"{case.model} {saving} --save-interval {FIRST - 1} --exit-interval {FIRST - 1}",
        )
        load = stopped.folder / "checkpoints"
        assert "scheduled an async checkpoint save at iteration       6" in stopped.log
    arguments = (
        f"{case.model} --load {load} --ckpt-step {FIRST - 1} --save-interval 1000 --no-load-rng {saving}"
    )
    resumed = jobs.run(f"resume-{variant}{'-async' if saving else ''}".replace(" ", "-"), arguments)
    assert resumed.curve == straight.curve[FIRST - 1 :]
    assert max(tensors_apart(resumed.weights(LAST), straight.weights(LAST), relative=False).values()) == 0


def test_forgetting_the_optimizer_is_noticed(run, jobs):
    case = Case("peri")
    load = run(case).folder / "checkpoints"
    arguments = f"{case.model} --load {load} --ckpt-step {FIRST - 1} --save-interval 1000 --no-load-rng"
    resumed = jobs.run("resume-without-optimizer", f"{arguments} --no-load-optim")
    assert resumed.curve[0]["lm loss"] == run(case).curve[FIRST - 1]["lm loss"]
    assert resumed.curve[-1]["lm loss"] != run(case).curve[-1]["lm loss"]


def test_adams_step_survives_a_change_of_layout(run, jobs):
    """Loaded into another layout, training goes on as it would have."""
    saved, target = (
        Case("peri", layout="DP2", variant=DISTRIBUTED),
        Case("peri", layout="TP2", variant=DISTRIBUTED),
    )
    curves = []
    for name, case in (("same", saved), ("other", target)):
        arguments = f"{case.model} {case.execution} --load {run(saved).folder / 'checkpoints'} --no-load-rng"
        arguments += f" --train-iters {LAST + 6} --override-opt-param-scheduler --save-interval 1000"
        curves.append(jobs.run(f"go-on-in-{name}", arguments, case.ranks).curve)
    same, other = ([point["lm loss"] for point in curve] for curve in curves)
    assert max(abs(a - b) / b for a, b in zip(other, same, strict=True)) < 2e-6


def test_the_step_is_saved(run):
    from megatron.core import dist_checkpointing

    folder = run(Case("peri", variant=DISTRIBUTED)).folder / "checkpoints" / f"iter_{LAST:07d}"
    common = dist_checkpointing.load_common_state_dict(str(folder))
    assert {group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]} == {LAST}


def test_the_torch_format_resumes_too(jobs):
    """``--ckpt-format torch``: one file a rank, without another layout."""
    model = f"{Case('peri').model} --ckpt-format torch"
    straight = jobs.run("torch-straight", f"{model} --save-interval {FIRST - 1}")
    load = straight.folder / "checkpoints"
    arguments = f"--load {load} --ckpt-step {FIRST - 1} --save-interval 1000 --no-load-rng"
    resumed = jobs.run("torch-resumed", f"{model} {arguments}")
    assert resumed.curve == straight.curve[FIRST - 1 :]
    refused = jobs.run("torch-refused", f"{model} --norm-placement post {arguments}", succeeds=False)
    assert refused.exit_codes == [1]
    assert "has norm placement peri (with embedding norm), and this run asks for post" in refused.log


def as_hybrid(case, pattern):
    """Return the flags of the hybrid model that computes what ``case`` does."""
    return case.model.replace("--num-layers 4", f"--hybrid-layer-pattern {pattern}")


@pytest.mark.parametrize("case", [Case("post", "biased"), Case("peri", variant=DISTRIBUTED)], ids=str)
def test_a_gpt_goes_on_as_a_hybrid_model(run, jobs, case):
    """docs/hybrid.md promises it, with the optimizer's state, bit for bit."""
    straight = run(case)
    goes_on = f"--load {straight.folder / 'checkpoints'} --ckpt-step {FIRST - 1} --save-interval 1000"
    name = f"hybrid-{case.placement}-{case.architecture}"
    resumed = jobs.run(name, f"{as_hybrid(case, '*-*-*-*-')} {goes_on} --no-load-rng")
    assert "loading a GPT checkpoint into the hybrid model" in resumed.log
    assert resumed.curve == straight.curve[FIRST - 1 :]


def test_a_gpt_with_other_sublayers_does_not(run, jobs):
    """Where a layer is left out, the checkpoint is refused; where one is new, its training shows it."""
    case = Case("post", "biased")
    straight = run(case)
    goes_on = f"--load {straight.folder / 'checkpoints'} --ckpt-step {FIRST - 1} --save-interval 1000"
    refused = jobs.run("hybrid-too-short", f"{as_hybrid(case, '*-*-*-')} {goes_on}", succeeds=False)
    assert refused.exit_codes == [1]
    assert "pairs with a GPT checkpoint of 3 layers, but the checkpoint has num_layers=4" in refused.log
    flags = f"{as_hybrid(case, 'M*-*-*-*-')} --mamba-state-dim 16 --mamba-head-dim 16 --mamba-num-groups 2"
    longer = jobs.run("hybrid-with-mamba", f"{flags} {goes_on} --no-load-rng")
    assert "1 hybrid layers keep their fresh initialization" in longer.log
    assert longer.curve != straight.curve[FIRST - 1 :]
