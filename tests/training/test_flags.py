"""Every flag of --help-all: flags.json says what it does to loss and gradients, and here it is run.

A flag that Megatron adds fails the first test until someone has said what it does.
"""

import functools
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import megatron.core
import megatron.training
import pytest
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt import gpt_layer_specs, moe_module_specs
from megatron.core.optimizer import OptimizerConfig, emerging_optimizers

import megatron_periln
from megatron_periln.errors import UsageError
from megatron_periln.models.gpt import placed_layer_spec
from megatron_periln.training.model_settings import MODEL_SETTINGS
from tests.training import flag_training
from tests.training import flag_trials as trials
from tests.training.flag_page import PAGE, write

FLAGS = json.loads((Path(__file__).parent / "flags.json").read_text())
# As on a GPU, but for what asks whether there is one, or for Transformer Engine's version.
TE = "--bf16 --norm-backend torch --no-rope-fusion"
REFUSALS = (UsageError, AssertionError, NotImplementedError, ValueError, ImportError)

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")


def flags(effect):
    return {flag: entry for flag, entry in FLAGS.items() if entry["effect"] == effect}


def listed(wrong):
    return "\n" + "\n".join(f"{what}: {found}" for what, found in wrong.items())


@pytest.fixture(scope="module")
def try_flag():
    """Return how a model with a flag differs from the one without: a set of words, or what refused it."""

    @functools.cache
    def base(model, given):
        args, _ = trials.parse(f"{trials.MODELS[model]} {given}")
        return trials.describe(trials.model_config_of(args)), functools.cache(lambda: trials.run(args))

    def run(flag, model):
        entry = FLAGS[flag]
        given = entry.get("with", "")
        try:
            args, said = trials.parse(f"{trials.MODELS[model]} {given} {entry['give']}")
            if f"\n  {flag} (" in said:
                return {"named"}
            config = trials.describe(trials.model_config_of(args))
            expected, run_without = base(model, given)
            if config == expected:
                return set()
            without, outcome = run_without(), trials.run(args)
        except REFUSALS as error:
            return {"refused", str(error)}
        except Exception as error:  # not in silence
            return {"crashed", repr(error)}
        differs = set() if outcome.same_model(without) else {"model"}
        differs |= set() if differs or outcome.same_training(without) else {"training"}
        return differs | ({"start"} if outcome.start != without.start else set()) | {"config"}

    return run


def actions():
    return {
        action.option_strings[0]: action
        for action in trials.parser()._actions
        if action.option_strings and action.option_strings[0] not in ("-h", "--help-all", "--yaml-cfg")
    }


def test_every_flag_has_an_entry_and_every_entry_a_flag():
    assert sorted(FLAGS) == sorted(actions())
    assert {entry["effect"] for entry in FLAGS.values()} <= {
        "model", "start", "training", "rounding", "run", "refused", "idle", "device"
    }  # fmt: skip


def test_what_changes_the_model_changes_it(try_flag):
    wrong = {}
    for flag, entry in flags("model").items():
        for model in entry["on"].split():
            if not (found := try_flag(flag, model)) & {"model", "training"}:
                wrong[flag, model] = found
    assert not wrong, listed(wrong)


def test_where_it_does_not_change_the_model_it_is_refused_or_named(try_flag):
    """Or the entry says why it can be silent."""
    wrong = {}
    for flag, entry in flags("model").items():
        for model in set(trials.MODELS) - set(entry["on"].split()):
            found = try_flag(flag, model)
            if not found & {"named", "refused", "crashed"} and model not in entry.get("silent", {}):
                wrong[flag, model] = found
    assert not wrong, listed(wrong)


def test_what_changes_how_it_runs_does_not_change_the_model(try_flag):
    wrong = {}
    for flag in flags("run"):
        for model in trials.MODELS:
            if (found := try_flag(flag, model)) & {"model", "training", "start"}:
                wrong[flag, model] = found
    assert not wrong, listed(wrong)


def test_what_changes_training_does_not_change_what_a_model_computes(try_flag):
    acting = set()
    wrong = {}
    for flag in flags("training"):
        for model in trials.MODELS:
            found = try_flag(flag, model)
            acting |= {flag} if "training" in found else set()
            if "model" in found:
                wrong[flag, model] = found
    assert not wrong, listed(wrong)
    assert {"--hidden-dropout", "--attention-dropout", "--moe-aux-loss-coeff", "--moe-z-loss-coeff"} <= acting


def test_what_changes_the_start_changes_initial_weights_alone(try_flag):
    wrong = {}
    for flag, entry in flags("start").items():
        found = try_flag(flag, entry.get("on", "dense"))
        if "model" in found or "start" not in found:
            wrong[flag] = found
    assert not wrong, listed(wrong)


def test_what_is_refused_or_named_is(try_flag):
    wrong = {}
    for effect, answer in (("refused", "refused"), ("idle", "named")):
        for flag in flags(effect):
            if answer not in (found := try_flag(flag, "dense")) and "refused" not in found:
                wrong[flag] = found
    assert not wrong, listed(wrong)


def test_what_needs_a_gpu_changes_nothing_in_silence_here(try_flag):
    wrong = {}
    for flag in flags("device"):
        for model in trials.MODELS:
            if (found := try_flag(flag, model)) & {"model", "training"}:
                wrong[flag, model] = found
    assert not wrong, listed(wrong)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Return a function that trains three steps by a model's name and flags: what came of it, if possible."""
    folder = tmp_path_factory.mktemp("trainings")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "29500")
        flag_training.prepare(folder)
        yield functools.cache(
            lambda model, flags: flag_training.train(f"{trials.MODELS[model]} {flags}", folder)
        )


def model_of(flag):
    return "moe" if "-moe-" in flag else "mla" if "-mla-" in flag else "dense"


def test_what_changes_training_changes_the_training_of_three_steps(train):
    """Losses, rates, gradients, order of data, evaluations, status or state; or it says why not here."""
    wrong = {}
    for effect in ("training", "start", "rounding"):
        for flag, entry in flags(effect).items():
            if "structure" in entry:
                continue
            trial = entry.get("train", {"beside": entry.get("with", "")})
            model, beside = trial.get("on", model_of(flag)), trial.get("beside", "")
            try:
                without = train(model, f"{beside} {trial.get('without', '')}")
                trained = train(model, f"{beside} {trial.get('give', entry['give'])}")
            except Exception as error:
                wrong[flag] = repr(error)
                continue
            if not trained.differs_from(without) or f"\n  {flag} (" in trained.said:
                wrong[flag] = "nothing changed"
    assert not wrong, listed(wrong)


def groups_of_run_flags(size=20):
    """Flags that change how a run goes and are not refused, by the model and what is given beside."""
    groups = {}
    for flag, entry in flags("run").items():
        model, beside = model_of(flag), entry.get("with", "")
        if "structure" not in entry and not refused_alone(flag, model, beside):
            groups.setdefault((model, beside), []).append(flag)
    for (model, beside), together in groups.items():
        for start in range(0, len(together), size):
            yield model, beside, together[start : start + size]


def refused_alone(flag, model, beside):
    try:
        flag_training.parse(f"{trials.MODELS[model]} {beside} {FLAGS[flag]['give']}", ".")
    except REFUSALS as error:
        return bool(error.args)
    except Exception:  # which training meets as well
        return False
    return False


def test_what_changes_how_it_runs_takes_the_same_steps(train):
    """Together; where they are refused together, in halves, down to those that are refused alone."""
    wrong = {}

    def compare(model, beside, together):
        given = " ".join(FLAGS[flag]["give"] for flag in together)
        try:
            if flag_training.same_training(train(model, f"{beside} {given}"), train(model, beside)):
                return
            found = "other steps"
        except REFUSALS as error:
            found = "" if error.args else repr(error)
        except Exception as error:
            found = repr(error)
        if len(together) > 1:
            half = len(together) // 2
            compare(model, beside, together[:half])
            compare(model, beside, together[half:])
        elif found:
            wrong[together[0]] = found

    for group in groups_of_run_flags():
        compare(*group)
    assert not wrong, listed(wrong)


def with_transformer_engine(flags):
    """Return what the configuration and the layers of Transformer Engine would be, and what was named."""
    args, said = trials.parse(f"{TE} {flags}", te=True)
    config = trials.model_config_of(args)
    spec = (
        placed_layer_spec(config, base=config.transformer_layer_spec) if not args.hybrid_layer_pattern else 0
    )
    return trials.describe(config), trials.describe(spec), said


def test_what_changes_the_model_reaches_transformer_engine_s_layers(monkeypatch):
    """By the structure of its specs, which needs no Transformer Engine; or is refused, or named."""
    for module in (gpt_layer_specs, moe_module_specs):
        monkeypatch.setattr(module, "TESpecProvider", TESpecProvider)
    without = functools.cache(lambda given: with_transformer_engine(given)[:2])
    wrong = {}
    for flag, entry in FLAGS.items():
        if entry["effect"] not in ("model", "device"):
            continue
        on = entry.get("on", "moe" if "-moe-" in flag else "mla" if "-mla-" in flag else "dense").split()
        given = f"{trials.MODELS[on[0]]} {entry.get('with', '')}"
        try:
            *built, said = with_transformer_engine(f"{given} {entry['give']}")
        except REFUSALS:
            continue
        if tuple(built) == without(given) and f"\n  {flag} (" not in said:
            wrong[flag] = on[0]
    assert not wrong, listed(wrong)


@pytest.fixture(scope="module")
def read():
    """Every name that a source of Megatron's or ours reads as an attribute, but for parsers' definitions."""
    roots = [Path(inspect.getfile(module)).parent for module in (megatron.core, megatron.training)]
    roots.append(Path(inspect.getfile(megatron_periln)).parent)
    refused_here = {"dropped_flags.py", "idle_flags.py"}
    found = set()
    for root in roots:
        for path in root.rglob("*.py"):
            if path.name not in refused_here:
                text = path.read_text()
                found |= set(re.findall(r"\.(\w+)\b(?!\s*=[^=])", text))
                found |= set(re.findall(r"""getattr\(\s*[\w.]+,\s*["'](\w+)""", text))
                for names in re.findall(r"""for name in \(([\w"', ]+)\)""", text):
                    found |= set(re.findall(r"\w+", names))
    # optimizer/emerging_optimizers.py takes an optimizer's arguments from what has its name before them.
    source = inspect.getsource(emerging_optimizers._kwargs_from_config)
    assert 'prefixed = f"{prefix}_{name}"' in source
    return found | {field.name for field in fields(OptimizerConfig) if field.name.startswith("muon_")}


def test_what_acts_is_read_by_something(read):
    """A flag that nothing reads is refused, or named; --traceback is read before there are arguments."""
    unread = {
        flag
        for flag, action in actions().items()
        if FLAGS[flag]["effect"] not in ("refused", "idle") and action.dest not in read | {"traceback"}
    }
    assert not unread, sorted(unread)


def test_reading_is_not_seen_where_there_is_none(read):
    for name in ("dist_ckpt_save_pre_mcore_014", "exit_signal_handler_for_dataloader", "use_flash_attn"):
        assert name not in read


def test_what_changes_the_model_is_compared_with_a_checkpoint_s():
    """All of the table's and no other, of Megatron's; the placement has a comparison of its own."""
    named = {
        action.dest
        for flag, action in actions().items()
        if FLAGS[flag]["effect"] == "model" or FLAGS[flag].get("model")
    }
    assert named - set(FLAGS["--norm-placement"]["elsewhere"]) == set(MODEL_SETTINGS)


def test_the_page_is_that_of_the_table():
    assert PAGE.read_text() == write(FLAGS), "run python -m tests.training.flag_page"
