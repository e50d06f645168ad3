"""Every statistic equals the one computed from the formulas on the reference GPT, in fp64."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_periln.monitor import hooks
from megatron_periln.monitor.collector import Collector
from megatron_periln.monitor.layer_sums import Sums, angular_distance
from megatron_periln.monitor.statistics import STATISTICS, STREAM_MAX_ABS
from megatron_periln.norms import NormPlacement
from tests.models import small
from tests.monitor import reference
from tests.reference_gpt import ReferenceGPT, Shape, load_megatron

pytestmark = pytest.mark.usefixtures("single_process")

TOLERANCE = 1e-5
LOSS_SCALE = 1024.0
FAMILIES = {
    "rmsnorm-swiglu-rope-gqa": {"normalization": "RMSNorm", "gated": True, "groups": 2},
    "layernorm-gelu-biases-learned": {"normalization": "LayerNorm", "bias": True, "rope": False},
    "zero-centered-biases": {"normalization": "RMSNorm", "zero_centered_gamma": True, "bias": True},
}
DEFAULTS = {"gated": False, "bias": False, "rope": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def microbatches():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(small.VOCABULARY, (2, 3, small.SEQUENCE + 1), generator=generator)
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in ids]


def build(family, placement, **changes):
    """Return a model wrapped for data parallelism, and the reference with its weights."""
    options = FAMILIES[family]
    gated, bias, rope = (options.get(key, default) for key, default in DEFAULTS.items())
    transformer = small.transformer_config(
        normalization=options["normalization"],
        layernorm_epsilon=1e-2,
        layernorm_zero_centered_gamma=options.get("zero_centered_gamma", False),
        num_query_groups=options.get("groups", 4),
        add_bias_linear=bias,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
        **changes,
    )
    model = small.build(
        placement,
        transformer,
        position_embedding_type="rope" if rope else "learned_absolute",
        share_embeddings_and_output_weights=False,
    )
    small.perturb(model)
    shape = Shape(
        num_layers=small.LAYERS,
        hidden_size=small.HIDDEN,
        num_heads=4,
        num_query_groups=transformer.num_query_groups,
        ffn_hidden_size=transformer.ffn_hidden_size,
        vocab_size=small.VOCABULARY,
        max_positions=small.SEQUENCE,
        placement=placement,
        embedding_norm=NormPlacement.named(placement).embedding,
        normalization=transformer.normalization,
        eps=1e-2,
        zero_centered_gamma=transformer.layernorm_zero_centered_gamma,
        gated=gated,
        bias=bias,
        rope=rope,
    )
    theirs = load_megatron(ReferenceGPT(shape).double(), model.state_dict())
    ddp = DistributedDataParallel(transformer, DistributedDataParallelConfig(), model)
    return ddp, theirs


def schedule(model):
    """Return what Megatron's schedules do, on `microbatches`: passes with a scaled loss, reduction."""

    def forward_backward():
        model.zero_grad_buffer()
        losses = []
        for ids, labels in microbatches():
            positions = torch.arange(small.SEQUENCE).expand_as(ids)
            loss = model(ids, positions, None, labels=labels)
            (LOSS_SCALE * loss.mean() / len(microbatches())).backward()
            losses.append({"lm loss": torch.stack([loss.sum(), torch.tensor(float(loss.numel()))]).detach()})
        model.finish_grad_sync()
        return losses

    return forward_backward


def collect(model, choice="all"):
    collector = Collector(choice)
    optimizer = SimpleNamespace(get_loss_scale=lambda: torch.tensor([LOSS_SCALE]))
    losses = collector.wrap(schedule(model), [model], optimizer)()
    return collector, losses


@functools.cache
def expected(family, placement):
    return reference.statistics(build(family, placement)[1], microbatches())


def errors(mine, theirs):
    """Return the largest relative error of each statistic; both must have None in the same places."""
    assert mine.keys() == theirs.keys() == set(STATISTICS)
    apart = {}
    for name in mine:
        assert [value is None for value in mine[name]] == [value is None for value in theirs[name]], name
        pairs = [(m, t) for m, t in zip(mine[name], theirs[name], strict=True) if m is not None]
        apart[name] = max((abs(m - t) / (abs(t) or 1.0) for m, t in pairs), default=0.0)
    return apart


each_placement = pytest.mark.parametrize("placement", [*small.PLACEMENTS, "scaled-peri"])
each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
@each_placement
@pytest.mark.parametrize("recompute", [{}, RECOMPUTE], ids=["", "recompute"])
def test_every_statistic_is_that_of_the_reference(family, placement, recompute):
    collector, _ = collect(build(family, placement, **recompute)[0])
    found = errors(collector.sums.values(collector.layers), expected(family, placement))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("placement", ["gated-peri", "gpas"])
def test_learned_scales_are_recorded(placement):
    model, _ = build("rmsnorm-swiglu-rope-gqa", placement)
    norm = model.module.decoder.layers[0].mlp_bda.norm
    collector, _ = collect(model)
    values = collector.sums.values(collector.layers)
    if placement == "gated-peri":
        b = norm.channel_gate.div(0.3).sigmoid()
        scales = (1 - b**2).sqrt().mean(), b.mean()
    else:
        scales = (1 - F.silu(norm.gate),) * 2
    recorded = [values[f"mlp_{name}_scale"][1] for name in ("residual", "output")]
    assert recorded == pytest.approx([scale.item() for scale in scales])


def test_the_fraction_beyond_half_of_fp16_is_that_of_the_reference():
    model, theirs = build("rmsnorm-swiglu-rope-gqa", "pre")
    with torch.no_grad():
        model.module.embedding.word_embeddings.weight.mul_(1e5)
        theirs.tokens.weight.mul_(1e5)
    right = reference.statistics(theirs, microbatches())
    assert all(0.1 < fraction < 0.9 for fraction in right["stream_fp16_half_fraction"][:-1])
    collector, _ = collect(model)
    mine = collector.sums.values(collector.layers)
    for name in ("stream_fp16_half_fraction", "stream_max_abs", "stream_mean_square"):
        assert mine[name] == pytest.approx(right[name], rel=TOLERANCE), name


@each_placement
def test_another_placements_statistics_differ(placement):
    family = "rmsnorm-swiglu-rope-gqa"
    collector, _ = collect(build(family, placement)[0])
    mine = collector.sums.values(collector.layers)["stream_mean_square"]
    for other in set(small.PLACEMENTS) - {placement}:
        theirs = expected(family, other)["stream_mean_square"]
        assert any(abs(m - t) > 1e-2 for m, t in zip(mine[1:-1], theirs[1:-1], strict=True)), other


@each_placement
def test_gradients_of_layers_and_the_rest_are_all_there_are(placement):
    model, theirs = build("layernorm-gelu-biases-learned", placement)
    collector, _ = collect(model, "1")
    reference.statistics(theirs, microbatches())
    gradients = [p.grad for p in theirs.parameters() if p.grad is not None]
    norm = sum(gradient.square().sum() for gradient in gradients).sqrt().item()
    assert collector.sums.gradient_norm() == pytest.approx(norm, rel=TOLERANCE)


@each_placement
def test_nothing_stays_behind_and_nothing_changes(placement):
    monitored, plain = (build("zero-centered-biases", placement)[0] for _ in range(2))
    bdas = [getattr(layer, "mlp_bda") for layer in monitored.module.decoder.layers]  # noqa: B009
    _, mine = collect(monitored)
    theirs = schedule(plain)()
    assert all(torch.equal(m["lm loss"], t["lm loss"]) for m, t in zip(mine, theirs, strict=True))
    for (name, m), t in zip(monitored.module.named_parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(m.main_grad, t.main_grad), name
    assert [layer.mlp_bda for layer in monitored.module.decoder.layers] == bdas
    for module in monitored.module.decoder.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_each_token_counts_once_under_recomputation(monkeypatch):
    tokens = sum(ids.numel() for ids, _ in microbatches())
    counts = {}
    for name, recomputing in (("right", hooks.recomputing), ("doubled", lambda: False)):
        monkeypatch.setattr(hooks, "recomputing", recomputing)
        collector, _ = collect(build("rmsnorm-swiglu-rope-gqa", "peri", **RECOMPUTE)[0])
        counts[name] = [collector.sums.counts(group) for group in ("stream", "angle", "attention", "mlp")]
    layers = [0, *[tokens] * small.LAYERS, 0, 0]
    assert collector.sums.counts("stream_gradient") == [*[len(microbatches())] * (small.LAYERS + 2), 0]
    assert counts["right"] == [[tokens] * (small.LAYERS + 2) + [0], layers, layers, layers]
    assert counts["doubled"][1] == [2 * count for count in layers]


class Reads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "index.Tensor")
        self.count += any(name in str(function) for name in names)
        return function(*args, **kwargs or {})


@each_placement
def test_nothing_is_read_before_the_values(placement):
    collector, counts = Collector("all"), {}
    optimizer = SimpleNamespace(get_loss_scale=lambda: torch.tensor([LOSS_SCALE]))
    model, _ = build("rmsnorm-swiglu-rope-gqa", placement, **RECOMPUTE)
    for name, run in (
        ("plain", schedule(model)),
        ("wrapped", collector.wrap(schedule(model), [model], optimizer)),
    ):
        with Reads() as reads:
            run()
        counts[name] = reads.count
    assert counts["wrapped"] == counts["plain"]
    with Reads() as reads:
        collector.sums.gradient_norm()
    assert reads.count > 0


def test_only_chosen_layers_are_there():
    model, _ = build("rmsnorm-swiglu-rope-gqa", "peri")
    everything = expected("rmsnorm-swiglu-rope-gqa", "peri")
    collector, _ = collect(model, "0,2")
    mine = collector.sums.values(collector.layers)
    assert collector.layers == [0, 2]
    assert (
        max(errors(mine, {name: values[0::2][:2] for name, values in everything.items()}).values())
        < TOLERANCE
    )


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-4, 0.1, 0.5, 0.9, 1.0])
def test_small_angles_keep_their_digits(angle):
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    turn = torch.tensor(angle * torch.pi, dtype=torch.float64)
    y = torch.stack([turn.cos(), turn.sin()])
    assert angular_distance(300 * x.float(), 0.01 * y.float()).item() == pytest.approx(
        angle, rel=1e-6, abs=1e-12
    )
    assert angular_distance(x.float(), torch.zeros(2)).item() == 0.5


def test_nan_is_kept(single_process):
    sums = Sums(num_layers=1)
    for value in (2.0, float("nan"), 1.0):
        sums.include(STREAM_MAX_ABS, 1, torch.tensor(value))
        sums.add("stream", 1, torch.tensor([1.0, value, value, 0.0]))
    sums.reduce()
    values = sums.values([0, 1])
    assert values["stream_max_abs"][0] is None
    assert all(torch.tensor(values[name][1]).isnan() for name in ("stream_max_abs", "stream_variance"))
