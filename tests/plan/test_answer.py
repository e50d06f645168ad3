"""What a plan says, and what would make it fit: on hand-made ranks."""

import json
import shlex
from dataclasses import replace

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.plan import __main__ as command
from megatron_periln.plan.answer import planned as planning
from megatron_periln.plan.answer.changes import applied
from megatron_periln.plan.answer.fit import step_time
from megatron_periln.plan.answer.planned import plan_layout
from megatron_periln.plan.answer.screen import screen
from megatron_periln.plan.costs.timing import recomputed, timing
from megatron_periln.plan.machine.gpus import GIB, GPUS
from megatron_periln.plan.options import PLACEMENTS
from tests.plan.hand_made import MACHINE, arguments, core, rank
from tests.report.page import Page


@pytest.fixture
def plan(monkeypatch):
    """Run the command on ranks whose activations a function of the flags tells; return status and output."""
    monkeypatch.setattr(command.cpu, "activate", lambda **_: None)

    def run(capsys, line, activations=lambda flags: 20 * GIB):
        monkeypatch.setattr(planning, "plan_ranks", core(activations))
        status = command.main(shlex.split(line))
        return status, *capsys.readouterr()

    return run


def test_a_run_that_fits(plan, capsys):
    status, out, err = plan(capsys, "--num-layers 8 --world-size 32")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(
        "160M parameters, peri, 32 x h100-80 in nodes of 8: TP2 PP2 DP8, 8 microbatches of 2"
    )
    assert "It fits: first stage needs" in out
    (first,) = [line for line in lines if line.startswith("first stage")]
    assert first.count("A") == 14 and first.endswith("22.2  fits")
    assert "C CUDA context" in out
    assert len(lines) < 45 and max(map(len, lines)) <= 120


def test_memory_is_the_ranks_and_the_allowances(plan, capsys):
    _, out, _ = plan(capsys, "--num-layers 8 --world-size 32 --json")
    data = json.loads(out)
    first, last = data["ranks"]
    tensors = rank().total
    assert first["bytes"] == pytest.approx(tensors * 1.02 + 0.6 * GIB + 3 * 0.3 * GIB, abs=3)  # TP, PP, DP
    assert last["bytes"] < first["bytes"] and data["fits"]
    assert data["checkpoint"]["parameters"] == 2 * (2 * (40_000_000 - 8192) + 8192)
    assert data["checkpoint"]["bytes"] == 14 * data["checkpoint"]["parameters"]
    sent = {each["group"]: each for each in first["sent"]}
    assert sent["TP"]["bytes"] == {"all-gather": 8_000_000} and sent["TP"]["links"] == "NVLink"
    assert sent["DP"]["bytes"] == {"reduce-scatter": 140_000_000, "all-gather": 70_000_000}
    assert sent["DP"]["links"] == "both"  # four of the eight are on each of two nodes
    assert sent["PP"]["bytes"] == {"send": 8 * 1024 * 2 * 1024 * 2, "send back": 0}
    assert sent["PP"]["links"] == "network" and sent["PP"]["over_network"] == sent["PP"]["bytes"]["send"]


def test_a_run_that_does_not_fit_ends_in_one_line(plan, capsys):
    status, out, err = plan(capsys, "--num-layers 8 --world-size 32 --brief --no-changes", lambda _: 90 * GIB)
    assert (status, out) == (1, "")
    assert err.startswith("error: the run does not fit: first stage needs 93.") and err.count("\n") == 1


def test_changes_that_make_it_fit(plan, capsys):
    """Only full recomputation and smaller microbatches: each was planned, and the cheaper comes first."""
    tried = []

    def activations(flags):
        tried.append(flags)
        return 10 * GIB if "full" in flags else 90 * GIB // (2 if "--micro-batch-size" in flags else 1)

    status, out, err = plan(capsys, "--num-layers 8 --world-size 32 --lr 1", activations)
    assert status == 1 and "DOES NOT FIT" in out
    told = [line for line in out.splitlines() if line.startswith("--")]
    assert [line.split()[:2] for line in told] == [
        ["--micro-batch-size", "1"],
        ["--recompute-granularity", "full"],
    ]
    assert float(told[1].split()[-1].rstrip("%")) == pytest.approx(26, abs=3)
    assert "give --micro-batch-size 1" in err
    assert all(flags[:4] == ["--num-layers", "8", "--lr", "1"] for flags in tried)
    assert len(tried) > 5


def test_two_changes_where_one_is_not_enough(plan, capsys):
    def activations(flags):
        return 300 * GIB // (2 if "--micro-batch-size" in flags else 1) // (3 if "full" in flags else 1)

    _, out, _ = plan(capsys, "--num-layers 8 --world-size 32", activations)
    (told,) = [line for line in out.splitlines() if line.startswith("--")]
    assert "--micro-batch-size 1" in told and "full" in told


def test_nothing_makes_it_fit(plan, capsys):
    status, out, err = plan(capsys, "--num-layers 8 --world-size 32", lambda flags: 900 * GIB)
    assert status == 1 and "None of the changes" in out and "more GPUs" in err


def test_changes_that_megatron_refuses_are_left_out(plan, capsys, monkeypatch):
    def activations(flags):
        if "full" in flags:
            raise UsageError("refused")
        return 90 * GIB // (2 if "--micro-batch-size" in flags else 1)

    _, out, _ = plan(capsys, "--num-layers 8 --world-size 32", activations)
    assert "--micro-batch-size 1" in out and "full" not in out


def test_compared_in_one_table(plan, capsys, tmp_path):
    page = tmp_path / "plan.html"
    line = f'--num-layers 8 --world-size 32 --page {page} --compare pre peri "--world-size 64" --lr 1'

    def activations(flags):
        return (20 if flags[-1] == "peri" else 15) * GIB

    status, out, err = plan(capsys, line, activations)
    assert (status, err) == (0, "")
    _, pre, peri, more, _ = out.splitlines()
    assert pre.split()[:4] == ["pre", "TP2", "PP2", "DP8"] and float(pre.split()[4]) < float(peri.split()[4])
    assert more.split()[:5] == ["--world-size", "64", "TP2", "PP2", "DP16"]
    shown = Page(page)
    traces = shown.traces("memory-1")
    (bar,) = [trace for trace in traces if trace["name"] == "activations"]
    assert bar["x"] == [20, 10] and bar["y"] == ["first stage (16)", "last stage (16)"]
    assert {"Memory", "Sent in a step", "Allowances"} <= set(shown.headings) and shown.loads == ["data:,"]
    assert [row[0] for row in shown.table("Run")] == ["Run", "pre", "peri", "--world-size 64"]


def test_a_refused_layout_has_its_line_in_the_comparison(plan, capsys):
    def activations(flags):
        if "--tensor-model-parallel-size" in flags:
            raise UsageError("Megatron refuses these flags: world size")
        return GIB

    status, out, _ = plan(
        capsys, "--num-layers 8 --world-size 32 --compare peri '--tensor-model-parallel-size 3'", activations
    )
    assert status == 0 and out.splitlines()[-1].startswith("--tensor-model-parallel-size 3: Megatron refuses")


@pytest.mark.parametrize(
    "line, said",
    [
        ("--num-layers 8", "--world-size"),
        ("--world-size 8", "give the flags of pretraining"),
        ("--world-size 0 --num-layers 8", "--world-size"),
        ("--world-size 8 --num-layers 8 --gpu h100-8", "did you mean h100-80"),
        ("--world-size 8 --num-layers 8 --mfu 40", "no share such as 0.4"),
        ("--world-size 8 --num-layers 8 --disk -1", "--disk"),
        ("--world-size 8 --num-layers 8 --compare sandwich", "is no placement"),
        ("--world-size 8 @/nowhere.flags", "flag file /nowhere.flags"),
    ],
)
def test_bad_input_is_one_line(plan, capsys, line, said):
    status, out, err = plan(capsys, line)
    assert (status, out) == (1, "") and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_placements_are_those_there_are():
    from megatron_periln.norms import placement

    assert tuple(placement.PLACEMENTS) == PLACEMENTS


def test_operations_and_days():
    """6 a token for each parameter of a matrix, and attention's; half as many GPUs take twice as long."""
    args = arguments()
    found = timing(args, GPUS["h100-80"], 0.4)
    matrices = 8 * 12 * 1024**2 + 1024 * 32768
    attention = 8 * 6 * 2048 * 1024  # 12 s h of the layer, half of it masked
    assert found.flops == pytest.approx(128 * 2048 * (6 * matrices + attention))
    assert found.step_seconds == pytest.approx(found.flops / (32 * 0.4 * 989.4e12))
    assert found.days == pytest.approx(1000 * found.step_seconds / 86400)
    assert timing(arguments(world_size=16), GPUS["h100-80"], 0.4).days == pytest.approx(2 * found.days)
    assert timing(arguments(train_iters=None, train_samples=1281), GPUS["h100-80"], 0.4).steps == 11


def test_the_last_stage_with_the_logits_is_waited_for():
    """32 M of a token's 8 layers of 12 M, a third of them; fewer layers there wait less, and many more."""
    args = arguments()
    alike = timing(args, GPUS["h100-80"], 0.4)
    assert alike.bubble == alike.ideal_bubble == pytest.approx(1 / 9)
    even, fewer, wrong = (
        timing(args, GPUS["h100-80"], 0.4, layers).bubble
        for layers in ([(4,), (4,)], [(5,), (3,)], [(1,), (7,)])
    )
    assert alike.bubble < fewer < even < wrong


def test_what_recomputation_computes_again():
    """A third of the layers' operations, of the MLPs', or of attention's products with the sequence."""
    layers, mlp, logits, attention = 12 * 8 * 1024**2, 8 * 8 * 1024**2, 1024 * 32768, 8 * 2048 * 1024
    whole = layers + logits + attention

    def share(modules):
        return recomputed(arguments(recompute_granularity="selective", recompute_modules=modules))

    full = recomputed(arguments(recompute_granularity="full", recompute_method="uniform"))
    assert full == pytest.approx((layers + attention) / whole / 3)
    assert share(["mlp"]) == pytest.approx(mlp / whole / 3)
    assert share(["core_attn"]) == pytest.approx(attention / whole / 3)
    assert share(["layernorm"]) == recomputed(arguments()) == 0


def test_changes_make_sense():
    args = arguments(use_distributed_optimizer=False, micro_batch_size=3, num_attention_heads=2)
    put = [" ".join(flags) for flags, _ in applied(["--micro-batch-size", "3"], args)]
    assert put[0] == "--use-distributed-optimizer"
    assert not any("micro-batch" in each or "tensor" in each or "moe_act" in each for each in put)
    assert "--pipeline-model-parallel-size 4" in put


def test_what_a_change_costs(monkeypatch):
    """Waiting and recomputation lengthen what is computed; only what is sent beside it is hidden."""
    monkeypatch.setattr(planning, "plan_ranks", core(lambda _: GIB))
    before = plan_layout("", ["--lr"], 32, MACHINE)
    again = plan_layout("", ["--recompute-granularity", "full"], 32, MACHINE)
    assert step_time(before, before) == pytest.approx(1)
    assert 1.2 < step_time(before, again) < 1 + again.timing.recomputed
    visible = replace(before, args=arguments(overlap_grad_reduce=False))
    assert step_time(before, visible) > 1.01
    unknown = replace(before, timing=replace(before.timing, step_seconds=None))
    assert step_time(unknown, again) == pytest.approx(1 + again.timing.recomputed)
    assert "at 40%" not in screen(unknown)
