import argparse
import os

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.monitor.settings import add_monitor_arguments, check_monitor, chosen_layers


def checked(folder, *flags, **megatron):
    parser = argparse.ArgumentParser()
    add_monitor_arguments(parser)
    args = parser.parse_args(["--monitor-layers", "all", *flags])
    defaults = {"save": str(folder), "num_layers": 4, "check_for_nan_in_loss_and_grad": True}
    vars(args).update({**defaults, **megatron})
    check_monitor(args)
    return args


def test_defaults(tmp_path):
    args = checked(tmp_path / "new" / "run")
    assert (args.monitor_interval, args.monitor_layers, args.monitor_stop_on) == (100, "all", None)
    assert args.monitor_file == str(tmp_path / "new" / "run" / "monitor.jsonl")
    other = f"{tmp_path}/other.jsonl"
    assert checked(None, "--monitor-file", other).monitor_file == other


@pytest.mark.parametrize(
    ("flags", "megatron", "message"),
    [
        ("--monitor-interval 0", {}, "--monitor-interval must be positive, not 0"),
        ("--monitor-layers 6", {}, "there is no layer 6"),
        ("--monitor-layers odd", {}, "--monitor-layers odd is none of"),
        ("", {"save": None}, "give --monitor-file or --save"),
        ("--monitor-file /", {}, "--monitor-file / is a folder"),
        ("--monitor-file /proc/self/monitor.jsonl", {}, "/proc/self is not writable"),
        ("--monitor-file /dev/null/monitor.jsonl", {}, "/dev/null is not writable"),
        ("--monitor-stop-on spike --monitor-file m.jsonl", {"save": None}, "a checkpoint: give --save"),
        ("--monitor-stop-on nan", {}, "give --no-check-for-nan-in-loss-and-grad too"),
        ("", {"use_megatron_fsdp": True}, "under --use-megatron-fsdp; drop one"),
        ("", {"overlap_moe_expert_parallel_comm": True}, "under --overlap-moe-expert-parallel-comm"),
        ("", {"cuda_graph_impl": "full_iteration"}, "the whole step is one CUDA graph; drop it or --cuda-"),
        ("", {"cuda_graph_impl": "transformer_engine", "fp8": "hybrid"}, "the scales of FP8"),
        (
            "",
            {"cuda_graph_impl": "local", "num_experts": 8, "cuda_graph_modules": ["moe_router"]},
            "layers of which Megatron's own CUDA graphs hold parts",
        ),
        ("", {"gtp_weight_remat_size": 2}, "--gtp-weight-remat-size"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, flags, megatron, message):
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).startswith("/proc"))
    with pytest.raises(UsageError, match=message):
        checked(tmp_path, *flags.split(), **megatron)


@pytest.mark.parametrize("graphs", ["local", "transformer_engine"])
def test_layers_in_graphs_are_seen(tmp_path, graphs):
    checked(tmp_path, cuda_graph_impl=graphs, num_experts=None, cuda_graph_modules=[])


def test_nothing_is_checked_without_a_monitor(tmp_path):
    parser = argparse.ArgumentParser()
    add_monitor_arguments(parser)
    args = parser.parse_args([])
    before = dict(vars(args))
    check_monitor(args)
    assert vars(args) == before and not args.monitor_layers


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every:1", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every:2", [0, 2, 4, 6, 7]),
        ("every:4", [0, 4, 7]),
        ("every:100", [0, 7]),
        ("3", [3]),
        ("7,0,3,3", [0, 3, 7]),
    ],
)
def test_choices(choice, layers):
    assert chosen_layers(choice, 6) == layers


@pytest.mark.parametrize("choice", ["", "some", "every:0", "every:-2", "every:", "1-3", "1,,2", "-1", "1, 2"])
def test_other_texts_are_refused(choice):
    with pytest.raises(UsageError, match="none of all, every:K, and a list of numbers"):
        chosen_layers(choice, 6)


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(UsageError, match=r"no layer 8; they are 0 \(the embedding\) to 7 \(the final norm\)"):
        chosen_layers("1,8", 6)
