"""All that Megatron refuses is found, where it stops at the first."""

import os
import sys

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.arguments import parse_args, validate_args

from megatron_periln.cpu.flags import adapt_arguments
from megatron_periln.training.parsing import add_arguments
from megatron_periln.training.refusals.statements import flags_of, statement_at
from megatron_periln.training.refusals.trial import go_on, try_validation

GOOD = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 4 --eval-interval 2 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 255
"""


@pytest.fixture
def arguments(monkeypatch):
    def parse(flags=""):
        monkeypatch.setattr(sys, "argv", ["pretrain", *GOOD.split(), *flags.split()])
        args = parse_args(add_arguments)
        args.embedding_norm = True
        adapt_arguments(args)
        return args

    return parse


def test_good_flags_are_validated_on_a_copy(arguments, capsys):
    args, untouched = arguments(), arguments()
    trial = try_validation(args)
    assert (trial.refusals, trial.error) == ([], None)
    assert args == untouched
    assert trial.args == validate_args(args)
    assert capsys.readouterr().out.count("using world size") == 1


BAD = {
    "--global-batch-size 5 --load-main-params-from-ckpt --moe-use-upcycling --recompute-granularity full": [
        "--eval-micro-batch-size: eval_global_batch_size (5)",
        "--load-main-params-from-ckpt must be used with --no-load-optim",
        "--moe-use-upcycling: When using upcycling, the --save option must be specified. (megatron/training/",
        "--recompute-granularity: Using recompute_granularity: full so recompute_method must be",
        "recompute_num_layers must be between 1 and num_layers_per_pipeline_rank: 2",
    ],
    "--swiglu --quick-geglu": ["--quick-geglu, --swiglu: it needs `not args.swiglu`, and says no more ("],
}


@pytest.mark.parametrize("flags", BAD)
def test_everything_that_is_refused_is_found(arguments, flags):
    args = arguments(flags)
    trial = try_validation(args)
    assert len(trial.refusals) == len(BAD[flags]), trial.refusals
    for refusal, words in zip(trial.refusals, BAD[flags], strict=True):
        assert words in refusal.text
        assert refusal.text.endswith(")")
    assert isinstance(trial.error, AssertionError | ValueError)


def test_what_a_refusal_reads_is_known(arguments):
    """So that one which comes of what the CPU's part changes can be told from others."""
    args = arguments("--load-main-params-from-ckpt")
    args.fine_grained_activation_offloading = True
    parameters, offloading, *_ = try_validation(args).refusals
    assert "no_load_optim" in parameters.names
    assert {"transformer_impl", "fine_grained_activation_offloading"} <= offloading.names


def test_what_is_no_refusal_is_left_to_what_meets_it(arguments):
    args = arguments()
    args.seq_length = "64"
    trial = try_validation(args)
    assert (trial.args, trial.refusals) == (None, [])


@pytest.mark.parametrize("flags", ["", "--multi-latent-attention --swiglu --norm-epsilon 1e-6"])
def test_going_on_changes_nothing_where_nothing_is_refused(arguments, flags):
    notes = []
    going_on = go_on(validate_args, lambda *note: notes.append(note))
    assert going_on(arguments(flags)) == validate_args(arguments(flags))
    values = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    for cls in (TransformerConfig, MLATransformerConfig):
        one, other = cls(**values), cls(**values)
        go_on(cls.__post_init__, lambda *note: notes.append(note), owner=cls)(one)
        cls.__post_init__(other)
        assert repr(one) == repr(other)
    assert notes == []


def test_statements_and_the_flags_that_they_read(monkeypatch, tmp_path):
    path = tmp_path / "checks.py"
    path.write_text(
        "def check(args):\n"
        "    if args.quick_geglu:\n"
        "        assert (\n"
        "            not args.swiglu\n"
        "        )\n"
        "    if args.fp8_param:\n"
        "        raise ValueError(\n"
        "            'no')\n"
    )
    assert statement_at(str(path), 1) is None
    assert statement_at(str(path), 99) is None
    assertion, raised = statement_at(str(path), 4), statement_at(str(path), 8)
    assert (assertion.kind, assertion.condition) == ("assert", "not args.swiglu")
    assert (raised.kind, raised.condition) == ("raise", "args.fp8_param")
    monkeypatch.setattr(sys, "argv", ["pretrain", "--quick-geglu", "--fp8-param-gather"])
    assert flags_of(assertion.names) == ["--quick-geglu"]
    assert flags_of(raised.names) == ["--fp8-param-gather"]
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    assert flags_of(assertion.names) == ["--quick-geglu", "--swiglu"]
    assert flags_of(assertion.names, given=True) == []
    assert flags_of([], "give --lr, and add_bias_linear") == ["--disable-bias-linear"]
    assert flags_of([], f"{os.sep}no flag") == []
