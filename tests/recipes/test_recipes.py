"""Public recipes train as published, or are refused in one message that names all that must go."""

import json
import re

import pytest

from tests.recipes.page import PAGE, REACHED, losses_of, page
from tests.recipes.recipes import RECIPES

REACHED = json.loads(REACHED.read_text())

# Some of each kind: layouts of several processes, mixtures, latent attention, fp16, FSDP, FP8, forks.
TRAINED = [
    "ft_fp16_local",  # PP2, fp16
    "ft_fsdp2",  # TP2, FSDP
    "ft_mup",  # one process
    "ft_tunable_overlap",  # PP4, virtual stages
    "habana_llama3_1",  # TP2 PP2 SP, a fork's
    "llmjp_8b",  # DP2
    "nv_gpt3_175b",  # TP2 PP2, fp16, growing batches
    "nv_gptoss_20b",  # PP2, a mixture with windows, FP8
    "nv_llama3_8b_fp8",  # DP2, FP8
    "nv_mixtral_8x7b",  # PP2, a mixture
    "poro2_8b",  # TP2 SP
    "zoo_dsv2_lite",  # EP2, latent attention
]


def refusal(outcome, work):
    """Return what a recipe was refused with, once everything about it is seen to be one message."""
    assert outcome.codes == [1], outcome.log[-3000:]
    assert "Traceback" not in outcome.log
    assert outcome.log.count("error:") == 1
    assert outcome.log.rstrip().endswith(outcome.message)
    assert not (work / "checkpoints").exists()
    return outcome.message


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_built_or_refused_in_one_message(runner, name):
    recipe = RECIPES[name]
    outcome = runner.build(recipe, mended=False)
    if not (recipe.refused or recipe.lacks or recipe.stuck):
        assert outcome.codes == [0], outcome.log[-3000:]
        assert "BUILT" in outcome.log
        return
    message = refusal(outcome, runner.folder / "built-published" / name)
    named = [*recipe.refused, *([recipe.needs.replace("_", "-")] if recipe.lacks else [])]
    for word in named:
        assert re.search(rf"{word}\b", message), f"{word} is not named: {message}"
    if recipe.stuck or not recipe.refused:
        return
    mended = runner.build(recipe, mended=True)
    assert mended.codes == [0], mended.log[-3000:]
    assert "BUILT" in mended.log


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_trains(runner, name):
    losses = losses_of(runner.train(RECIPES[name]))
    assert losses == pytest.approx(REACHED[name], rel=5e-3)


def test_the_page_says_what_was_reached():
    assert list(REACHED) == list(RECIPES)
    assert PAGE.read_text() == page(RECIPES, REACHED)


def test_enough_train_and_most_as_published():
    trained = {name for name, losses in REACHED.items() if losses}
    assert len(RECIPES) == 53
    assert len(trained) == 53
    assert sum(RECIPES[name].as_published for name in trained) >= 43
