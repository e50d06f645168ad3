"""The paper's models and studies: what the flag files build is what the tables say."""

import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

from megatron_periln import flag_files
from megatron_periln.models import GPTModelBuilder, GPTModelConfig
from megatron_periln.norms import PLACEMENTS, PRE
from megatron_periln.norms.arguments import placement_of
from megatron_periln.studies.launching import check_run_flags
from megatron_periln.studies.study import read_study
from megatron_periln.studies.table import markdown, summarize
from megatron_periln.training.parsing import add_arguments

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples/paper"
SIZES = {"400m": 400e6, "1.5b": 1.5e9, "3.2b": 3.2e9}
STUDIES = sorted((PAPER / "studies").glob("*.yaml"))
PADDED_VOCABULARY = 100352


def arguments(monkeypatch, *flags):
    from megatron.training.arguments import parse_args, validate_args

    from megatron_periln.cpu.flags import adapt_arguments

    flags = flag_files.expand([*flags, "--device", "cpu", "--monitor-file", "monitor.jsonl"])
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
    monkeypatch.setenv("WORLD_SIZE", "1")
    args = parse_args(add_arguments)
    adapt_arguments(args)
    return validate_args(args, {"tokenizer_type": "NullTokenizer"})


@pytest.fixture
def parameters(monkeypatch, single_process):
    """Return the parameters by name of a size with a placement, on the meta device."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args

    def build(size, placement):
        args = arguments(monkeypatch, f"@{PAPER / size}.flags", "--norm-placement", placement)
        args.use_cpu_initialization, args.padded_vocab_size = True, PADDED_VOCABULARY
        config = gpt_config_from_args(args, model_config_cls=GPTModelConfig)
        config.norm_placement = placement_of(args)
        with torch.device("meta"):
            model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
        return {name: parameter.numel() for name, parameter in model.named_parameters()}

    return build


def counts(parameters):
    """Return the numbers without embeddings and in all."""
    outside = [n for name, n in parameters.items() if not re.search("word_embeddings|output_layer", name)]
    return sum(outside), sum(parameters.values())


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_the_parameters_of_the_paper_and_of_the_table(size, parameters):
    without_embeddings, in_all = counts(parameters(size, "pre"))
    assert without_embeddings == pytest.approx(SIZES[size], rel=0.02)
    row = next(line for line in (PAPER / "README.md").read_text().splitlines() if f"[{size}.flags]" in line)
    assert row.endswith(f"| {without_embeddings:,} | {in_all:,} |")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements_differ_by_their_norms_alone(placement, parameters):
    difference = counts(parameters("400m", placement))[0] - counts(parameters("400m", "pre"))[0]
    norms = {"pre": 0, "post": -1, "peri": 2 * 24 + 1, "output": 1}
    norms |= {"deepnorm": -1, "keel": 2 * 24 - 1, "hybrid-norm": -24}
    norms |= {"scaled-peri": 2 * 24 + 1, "gated-peri": 4 * 24 + 1}
    scalars = 48 if placement == "gpas" else 0
    assert difference == norms.get(placement, 0) * 1024 + scalars
    assert difference == PLACEMENTS[placement].num_parameters(24, 1024) - PRE.num_parameters(24, 1024)


@pytest.mark.parametrize("size", SIZES)
def test_benchmarks_measure_the_same_models(size, parameters, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shape = importlib.import_module("step_model").SIZES[size.upper()]
    layer = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.ffn_hidden_size + 2 * shape.hidden_size
    expected = shape.num_layers * layer + shape.hidden_size
    assert counts(parameters(size, "pre"))[0] == expected
    assert shape.vocab_size == PADDED_VOCABULARY


@pytest.mark.parametrize("size", SIZES)
def test_a_size_trains_on_thirty_billion_tokens(size, monkeypatch):
    args = arguments(monkeypatch, f"@{PAPER / size}.flags")
    assert args.train_iters * args.global_batch_size * args.seq_length == pytest.approx(30e9, rel=1e-3)
    assert (args.lr, args.weight_decay, args.lr_decay_style) == (2e-3, 0.033, "cosine")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_are_valid(path):
    study = read_study(path)
    check_run_flags(study)
    assert len(study.seeds) >= (1 if path.stem == "125m_gpu" else 3)  # twelve minutes hold no more


def test_the_rules_study_is_that_of_the_learning_rate_for_all_other_rules():
    rules, rates = (read_study(PAPER / "studies" / f"{name}.yaml") for name in ("rules", "learning_rate"))
    assert (rules.flags, rules.seeds, rules.grid["lr"]) == (rates.flags, rates.seeds, rates.grid["lr"])
    assert rules.grid["rule"].keys() | rates.grid["norm-placement"].keys() == PLACEMENTS.keys()


def test_tokenizer_is_that_of_tiktoken_with_the_same_ids(tmp_path):
    """An encoding with a gap before and between its special tokens, as cl100k_base has."""
    from transformers import AutoTokenizer

    spec = importlib.util.spec_from_file_location("cl100k_tokenizer", PAPER / "cl100k_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pairs = [b"th", b"the", b" the", b"in", b"ing", b"\xc3\xa9"]
    encoding = tiktoken.Encoding(
        "small",
        pat_str=r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        mergeable_ranks={bytes([i]): i for i in range(256)} | {pair: 256 + i for i, pair in enumerate(pairs)},
        special_tokens={"<|endoftext|>": 263, "<|endofprompt|>": 270},
    )
    module.write_tokenizer(encoding, tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    text = "The thing\n\n  then 12345 é I'll\t sing <|endoftext|>again " + (ROOT / "README.md").read_text()
    expected = encoding.encode(text, allowed_special="all")
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.decode(expected) == text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (263, 271)


@pytest.fixture(scope="module")
def results():
    """The committed results by study."""
    return {path.stem: json.loads(path.read_text()) for path in (PAPER / "results").glob("*.json")}


def test_tables_are_those_of_the_results(results):
    assert results.keys() == {"learning_rate", "longer", "ablations", "surroundings", "width", "rules"}
    for name, of_study in results.items():
        assert of_study["summary"] == summarize(of_study["runs"])
        assert (PAPER / "results" / f"{name}.md").read_text() == markdown(of_study)


def test_results_are_of_the_studies_that_are_shipped(results):
    for name, of_study in results.items():
        study = read_study(PAPER / "studies" / f"{name}.yaml")
        assert of_study["flags"] == shlex.join(study.flags)
        assert [tuple(run["flags"]) for run in of_study["runs"]] == [
            run.flags[len(study.flags) :] for run in study.runs()
        ]


def test_the_page_states_what_was_measured(results, monkeypatch):
    """The table of the variants, and every mean with its deviation."""
    monkeypatch.syspath_prepend(str(PAPER))
    claims = importlib.import_module("claims")
    page = (ROOT / "docs/reproduction.md").read_text()
    table = claims.variants(results.__getitem__)
    numbers = claims.measurements(results.__getitem__).values()
    assert table in page
    assert claims.widths(results.__getitem__) in page
    rules = claims.rules(results.__getitem__)
    assert rules in page
    spread = re.compile(r"\d[\d,.e+]* ± \d[\d,.e+]*\d")
    stated = spread.findall(page.replace(table, "").replace(rules, ""))
    assert len(stated) > 15
    assert set(stated) <= set(spread.findall(" ".join([table, rules, *numbers])))


def test_the_best_rate_is_that_of_a_parabola(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER))
    best_rate = importlib.import_module("claims").best_rate
    losses = {10.0**power: 3 + (power + 2.3) ** 2 for power in (-1, -2, -3, -4)}
    assert best_rate(losses) == "5.0e-03"
    assert best_rate({1e-3: 1, 1e-2: 2, 1e-1: 3}) == "at most 1.0e-03"
    assert best_rate({1e-3: 3, 1e-2: 2, 1e-1: 1}) == "at least 1.0e-01"


def test_figures_are_drawn_from_the_results(results, monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER))
    drawn = importlib.import_module("figures").figures(results.__getitem__)
    for name, text in drawn.items():
        assert (ROOT / f"docs/images/reproduction-{name}.svg").read_text() == text
        assert f"images/reproduction-{name}.svg" in (ROOT / "docs/reproduction.md").read_text()
