"""In a hybrid model each sublayer is a layer; ``"*-" * L`` is the GPT of ``L`` layers."""

import pytest

from megatron_periln.monitor.hooks import watched
from megatron_periln.monitor.layer_sums import Sums
from megatron_periln.norms import NormPlacement
from tests.models import small
from tests.models.test_hybrid import KINDS, as_hybrid, hybrid

pytestmark = pytest.mark.usefixtures("single_process")


def statistics(model):
    layers = range(model.config.num_layers + 2)
    sums = Sums(model.config.num_layers)
    with watched([model], sums, layers):
        small.run(model).mean().backward()
    return sums.values(layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", small.PLACEMENTS)
def test_a_hybrid_model_has_the_statistics_of_its_gpt(placement, kind):
    gpt = small.perturb(small.build(placement, small.transformer_config(**KINDS[kind])))
    model = hybrid(NormPlacement.named(placement), kind)
    model.load_state_dict(as_hybrid(gpt.state_dict()))
    mine, theirs = statistics(model), statistics(gpt)
    for name in ("stream_variance", "stream_max_abs", "stream_gradient_norm"):
        assert [mine[name][layer] for layer in (0, 2, 4, 5)] == theirs[name], name
    for place, sublayer in ((1, "attention"), (2, "mlp")):
        for name in ("mean_square", "output_variance", "ratio", "gain_mean", "gain_min", "gain_max"):
            values = mine[f"{sublayer}_{name}"]
            assert values[place:5:2] == theirs[f"{sublayer}_{name}"][1:3], name
            assert values[3 - place : 5 : 2] == [None, None], name
