"""Flags of other Megatrons: the tables' rows hold for this one, and the command line says what they "
"became."""

import itertools
import re

import pytest

from megatron_periln.rules import Problems
from megatron_periln.training.flag_names.explain import close_spelling, find_former
from megatron_periln.training.flag_names.forks import FORKS
from megatron_periln.training.flag_names.lenient import parse_leniently
from megatron_periln.training.flag_names.upstream import NEWER, UPSTREAM
from tests.training import flag_trials as trials

TABLES = [*UPSTREAM.values(), NEWER, *FORKS.values()]
ROWS = list(itertools.chain.from_iterable(table.items() for table in TABLES))


@pytest.fixture(scope="module")
def known():
    """Every flag of this Megatron and its action."""
    return {option: action for action in trials.parser()._actions for option in action.option_strings}


def parse(words):
    problems = Problems()
    args = parse_leniently(trials.parser(), problems, words.split())
    return args, problems


def test_a_former_flag_is_none_now(known):
    names = [name for name, _ in ROWS if " " not in name]
    assert [name for name in names if name in known] == []


def test_a_former_value_is_none_now(known):
    for name in (name for name, _ in ROWS if " " in name):
        flag, value = name.split()
        if flag in known:
            assert value not in known[flag].choices, name
        else:
            assert find_former([flag]), name


def test_what_is_to_be_given_instead_is_there(known):
    for name, advice in ROWS:
        for flag in re.findall(r"--[\w-]+", advice):
            assert flag in known, f"{name}: {flag}"
        words = advice.split()
        if advice.startswith("--") and len(words) == 2:
            assert known[words[0]].choices is None or words[1] in known[words[0]].choices, name
        if advice.startswith("--") and len(words) == 1:  # the values follow
            assert known[words[0]].nargs != "?", name


def test_one_fork_s_advice_is_another_s():
    """A flag that two have is found in the first, so both must mean the same by it."""
    for name in {name for name, _ in ROWS}:
        kinds = {bool(table[name]) for table in TABLES if name in table}
        assert len(kinds) == 1, name


SAID = {
    "--linear-attention-type gated_delta_net": (
        "unrecognized arguments: --linear-attention-type gated_delta_net: of Megatron on its main or dev "
        "branch, "
        "between releases; give --experimental-attention-variant gated_delta_net"
    ),
    "--no-weight-decay-cond-type qwen3_next": (
        "--no-weight-decay-cond-type qwen3_next: of Megatron on its main or dev branch, between releases; "
        "give --apply-wd-to-qk-layernorm"
    ),
    "--qk-nope-head-dim 16": (
        "unrecognized arguments: --qk-nope-head-dim 16: of Pai-Megatron-Patch; give --qk-head-dim 16"
    ),
    "--qk-rope-head-dim=8": (
        "unrecognized arguments: --qk-rope-head-dim=8: of Pai-Megatron-Patch; give --qk-pos-emb-head-dim 8"
    ),
    "--lr-wsd-decay-style 1-sqrt": (
        "--lr-wsd-decay-style 1-sqrt: of swiss-ai's fork (Apertus); give --lr-wsd-decay-style minus_sqrt"
    ),
    "--xielu": (
        "unrecognized arguments: --xielu: of swiss-ai's fork (Apertus); megatron-core has no such "
        "activation, and with "
        "another this is another model: train with that fork"
    ),
    "--retro-num-neighbors 2": (
        "unrecognized arguments: --retro-num-neighbors 2: of Megatron until core 0.15; retrieval (RETRO) is "
        "gone from "
        "megatron-core; without it this is another model"
    ),
    "--moe-expert-parallel-size 2": (
        "unrecognized arguments: --moe-expert-parallel-size 2: of Pai-Megatron-Patch and "
        "Megatron-DeepSpeed; give "
        "--expert-model-parallel-size 2"
    ),
    "--norm-placment peri": (
        "unrecognized arguments: --norm-placment peri; did you mean --norm-placement? --help lists the flags"
    ),
    "--num_layers 2": (
        "unrecognized arguments: --num_layers 2; did you mean --num-layers? --help lists the flags"
    ),
    "--qwertyuiop": "unrecognized arguments: --qwertyuiop; --help lists the flags",
}


@pytest.mark.parametrize("words", SAID)
def test_what_is_said(words):
    problems = parse(words)[1]
    assert problems.texts == [SAID[words]]
    assert problems.harmless == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--enable-one-logger", "--enable-one-logger: of Megatron until core 0.7; it changes nothing here"),
        ("--use-mpi", "--use-mpi: of llm-jp's fork; it changes nothing here"),
        ("--train-mode pretrain", "--train-mode pretrain: of Pai-Megatron-Patch; it changes nothing here"),
        (
            "--use-fused-sdpa=1",
            "--use-fused-sdpa=1: of Habana's fork; it makes that fork faster, or saves memory, and does not "
            "change what is computed",
        ),
    ],
)
def test_what_changes_nothing_is_accepted(words, said):
    args, problems = parse(f"--num-layers 3 {words} --hidden-size 64")
    assert problems.texts == []
    assert problems.harmless == [said]
    assert (args.num_layers, args.hidden_size) == (3, 64)


@pytest.mark.parametrize("words", ["--train-mode finetune", "--dataset JSON-SFT", "--kill-switch-file f"])
def test_what_changes_something_is_not(words):
    problems = parse(words)[1]
    assert len(problems.texts) == 1
    assert problems.harmless == []


def test_all_of_them_are_said_at_once_and_the_rest_is_checked_as_they_are_called_here():
    """Qwen3-Next's recipe without its renamed flag would train plain attention."""
    args, problems = parse(" ".join([*SAID, "--num-layers 3"]))
    assert set(problems.texts) == set(SAID.values())
    assert not problems.final
    assert args.num_layers == 3
    assert args.experimental_attention_variant == "gated_delta_net"
    assert (args.qk_head_dim, args.qk_pos_emb_head_dim) == (16, 8)
    assert args.apply_wd_to_qk_layernorm and args.no_weight_decay_cond_type is None
    assert args.lr_wsd_decay_style == "minus_sqrt"


def test_the_same_is_said_once():
    """As of the flags of Apertus for its optimizer, and for its loss."""
    words = "--goldfish-loss --goldfish-k 50 --ademamix-alpha 8 --num-layers 3 --ademamix-beta3 0.9"
    said = parse(words)[1].texts
    assert [text.split(": of swiss-ai")[0] for text in said] == [
        "unrecognized arguments: --goldfish-loss, --goldfish-k 50",
        "unrecognized arguments: --ademamix-alpha 8, --ademamix-beta3 0.9",
    ]


def test_a_value_that_nobody_had_is_still_wrong():
    problems = parse("--lr-wsd-decay-style sqrt")[1]
    assert ["invalid choice: 'sqrt'" in text for text in problems.texts] == [True]


@pytest.mark.parametrize(
    ("flag", "near"), [("--lr-decay-iter", "--lr-decay-iters"), ("--LR", None), ("--tensor-parallel", None)]
)
def test_only_a_close_spelling_is_one(known, flag, near):
    assert close_spelling(flag, list(known)) == near


def test_the_tables_name_flags_alone():
    assert all(re.fullmatch(r"--?[A-Za-z][\w-]*\*?( [\w.-]+)?", name) for name, _ in ROWS)
    assert all(advice == advice.strip() and not advice.endswith(".") for _, advice in ROWS)
