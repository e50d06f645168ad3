"""Packages that flags need are asked for before anything is built, each in one line with what to install."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_periln import cpu
from megatron_periln.rules import Problems
from megatron_periln.training import packages
from megatron_periln.training.idle_flags import idle_flags
from megatron_periln.training.packages import PACKAGES, installed, save_asynchronously_without_nvrx
from tests.training import flag_trials as trials

FOLDER = "--wandb-save-dir folder"
EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]

NEEDED = {
    f"--wandb-project x --wandb-exp-name y {FOLDER}": ("wandb", "drop the --wandb flags"),
    "--optimizer muon": ("emerging_optimizers", "choose adam or sgd"),
    "--optimizer soap": ("emerging_optimizers", "choose adam or sgd"),
    "--non-persistent-ckpt-type local": ("nvidia_resiliency_ext", "--non-persistent-ckpt-type global"),
    "--enable-ft-package": ("nvidia_resiliency_ext", "drop it"),
    "--fault-injector-num-ranks 1": ("nvidia_resiliency_ext", "drop them"),
    "--hierarchical-context-parallel-sizes 2 2": ("einops", "--cp-comm-type p2p"),
    "--use-megatron-fsdp": ("einops", "--use-distributed-optimizer"),
    "--hybrid-layer-pattern M-M*": ("mamba_ssm", "a pattern without M"),
    "--experimental-attention-variant gated_delta_net": ("fla", "other attention"),
    "--hybrid-layer-pattern G-": ("fla", "other attention"),
    "--experimental-attention-variant dsa": ("fast_hadamard_transform", "other attention"),
    "--moe-token-dispatcher-type flex": ("deep_ep", "alltoall, which computes the same"),
    "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep": ("deep_ep", "alltoall"),
    "--attention-backend flash": ("flash_attn", "drop it"),
    "--enable-msc": ("multistorageclient", "drop it"),
    "--data-path 1 s3://bucket/data": ("boto3", "paths of this machine"),
}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """As where there is one: what the CPU lacks is said by other rules."""
    monkeypatch.setattr(cpu, "is_active", lambda: False)


def parse(flags):
    return trials.parser().parse_args(f"{trials.COMMON} {flags}".split())


def problems(args):
    found = Problems()
    found.find(args, PACKAGES)
    return found.texts


@pytest.mark.parametrize("flags", NEEDED)
def test_what_is_missing_is_named(monkeypatch, flags):
    module, otherwise = NEEDED[flags]
    monkeypatch.setattr(packages, "installed", lambda *modules: module not in modules)
    (text,) = problems(parse(flags))
    assert re.search(
        r"needs the package \S.*, which is not installed; (pip install '|install it from )", text
    )
    assert otherwise in text and "\n" not in text
    for extra in re.findall(r"megatron-periln\[(\w+)\]", text):
        assert extra in EXTRAS


@pytest.mark.parametrize("flags", NEEDED)
def test_what_is_installed_is_no_problem(monkeypatch, flags):
    monkeypatch.setattr(packages, "installed", lambda *modules: True)
    assert problems(parse(flags)) == []


def test_nothing_is_needed_by_default(monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda *modules: False)
    assert problems(parse("")) == []


def test_all_are_said_at_once(monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda *modules: False)
    args = parse(" ".join(("--wandb-project x --optimizer muon --moe-token-dispatcher-type flex", FOLDER)))
    assert len(problems(args)) == 3
    assert (args.wandb_project, args.optimizer, args.moe_token_dispatcher_type) == ("", "adam", "alltoall")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (f"--wandb-project x {FOLDER}", "--wandb-project needs --wandb-exp-name"),
        ("--wandb-project x --wandb-exp-name y", "give --wandb-save-dir, or --save"),
        ("--wandb-project x --wandb-exp-name y --save folder", ""),
    ],
)
def test_what_only_the_last_rank_would_find_out(monkeypatch, flags, error):
    monkeypatch.setattr(packages, "installed", lambda *modules: True)
    assert error in "".join(problems(parse(flags)))
    assert bool(problems(parse(flags))) == bool(error)


def test_a_module_is_found_without_importing_it(monkeypatch, tmp_path):
    (tmp_path / "found_here.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed("absent.part", "found_here")
    assert not installed("absent", "absent.part")
    assert "found_here" not in sys.modules


def test_asynchronous_saves_do_without_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    args = parse("--async-save --use-persistent-ckpt-worker")
    (line,) = save_asynchronously_without_nvrx(args)
    assert line.startswith("--async-strategy: mcore") and "megatron-periln[resiliency]" in line
    assert args.async_strategy == "mcore"
    assert save_asynchronously_without_nvrx(args) == []
    assert save_asynchronously_without_nvrx(parse("--async-save")) == []


@pytest.mark.parametrize("flags", ["--log-energy", "--inprocess-restart"])
def test_what_megatron_would_do_without_in_silence_is_idle(monkeypatch, flags):
    for module in ("pynvml", "nvidia_resiliency_ext"):
        monkeypatch.setitem(sys.modules, module, None)
    (line,) = idle_flags(parse(flags), trials.parser())
    assert line.startswith(f"{flags} (it needs the package n")
