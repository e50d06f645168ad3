"""What a watch raises, and that a resumed one raises what an uninterrupted one does."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_periln.monitor.alerts import ALERTS, STOPS, Alert, Watch, WeightLimits
from megatron_periln.monitor.record import RunRecord
from tests.monitor.records import HEADER
from tests.monitor.series import NOISES, falling_loss, gradient_norm, with_spikes

NAN, INF = math.nan, math.inf


def kinds(alerts: list[Alert]) -> list[str]:
    assert all(alert.kind in ALERTS and alert.message and "\n" not in alert.message for alert in alerts)
    return [alert.kind for alert in alerts]


def test_spikes_of_loss_and_gradient():
    watch = Watch()
    noise = np.exp(0.005 * np.random.default_rng(0).standard_normal((300, 2)))
    raised = []
    for step, (loss, grad_norm) in enumerate(noise * [3, 1], 1):
        raised += watch.step(
            step, loss * (1.3 if step == 200 else 1), grad_norm * (10 if step in (198, 199) else 1)
        )
    assert [(alert.iteration, alert.kind) for alert in raised] == [
        (198, "gradient-spike"),
        (200, "loss-spike"),
    ]
    assert raised[1].message.startswith("loss 3.9") and "where about 3" in raised[1].message
    assert raised[1].value == pytest.approx(3.9, rel=0.02)


def test_not_finite_once_an_episode():
    watch = Watch()
    assert kinds(watch.step(1, 3.0, NAN)) == ["nan"]
    assert watch.step(2, 3.0, INF) == []
    assert kinds(watch.step(3, NAN, 1.0)) == ["nan"]
    assert kinds(watch.step(4, 3.0, INF)) == ["nan"]
    assert watch.step(5, None, None) == []


def test_skipped_overflows_are_no_alert():
    watch = Watch(skips_overflow=True)
    assert watch.step(1, 3.0, INF) == []
    assert watch.layers(1, [0, 1], {"stream_gradient_norm": [INF, INF]}) == []
    assert kinds(watch.step(2, NAN, INF)) == ["nan"]


@pytest.mark.parametrize(
    ("statistics", "layer", "name"),
    [
        ({"stream_max_abs": [1, 1, INF, NAN]}, 2, "stream_max_abs"),
        ({"stream_max_abs": [1, NAN, NAN, NAN], "mlp_ratio": [None, NAN, 1, None]}, 1, "mlp_ratio"),
        (
            {"mlp_variance": [None, INF, 1, None], "attention_ratio": [None, INF, 1, None]},
            1,
            "attention_ratio",
        ),
        ({"stream_gradient_norm": [NAN, NAN, NAN, 1]}, 2, "stream_gradient_norm"),
        ({"stream_gradient_norm": [NAN, NAN, NAN, NAN], "mlp_ratio": [None, 1, INF, None]}, 2, "mlp_ratio"),
    ],
)
def test_first_layer_that_is_not_finite(statistics, layer, name):
    watch = Watch()
    (alert,) = watch.layers(7, [0, 1, 2, 3], statistics)
    assert (alert.kind, alert.layer, alert.iteration) == ("nan", layer, 7)
    assert alert.message.startswith(name)
    assert watch.layers(8, [0, 1, 2, 3], statistics) == []


def test_ranges_once_each():
    watch = Watch()
    assert watch.layers(1, [0, 1], {"stream_max_abs": [1.0, 447.0]}) == []
    assert kinds(watch.layers(2, [0, 1], {"stream_max_abs": [1.0, 500.0]})) == ["fp8-range"]
    (alert,) = watch.layers(3, [0, 1], {"stream_max_abs": [33_000.0, 500.0]})
    assert (alert.kind, alert.layer, alert.value) == ("fp16-range", 0, 33_000.0)
    assert watch.layers(4, [0, 1], {"stream_max_abs": [40_000.0, 500.0]}) == []
    assert "overflow" in watch.layers(5, [0, 1], {"stream_max_abs": [1.0, 70_000.0]})[0].message
    assert kinds(Watch().layers(1, [0], {"stream_max_abs": [1e6]})) == [
        "fp8-range",
        "fp16-range",
        "fp16-range",
    ]


def weights(low: float | None, high: float | None) -> dict[str, list[float | None]]:
    return {"mlp_gain_min": [None, low, 1.0], "mlp_gain_max": [None, high, 1.0]}


def test_weights_of_output_norms():
    watch = Watch()
    assert watch.layers(1, [0, 1, 2], weights(-0.02, 0.001)) == []
    (alert,) = watch.layers(2, [0, 1, 2], weights(-0.002, 0.001))
    assert (alert.kind, alert.layer) == ("dead-gain", 1)
    assert "mlp in layer 1" in alert.message
    assert watch.layers(3, [0, 1, 2], weights(-0.002, 0.001)) == []
    assert kinds(watch.layers(4, [0, 1, 2], weights(-150.0, 1.0))) == ["exploding-gain"]
    assert watch.layers(5, [0, 1, 2], weights(None, None)) == []


def test_weights_are_measured_by_their_start():
    assert kinds(Watch(initial_weight=0.1).layers(1, [0, 1, 2], weights(0.0, 0.002))) == []
    assert kinds(Watch(weights=WeightLimits(dead=0.5)).layers(1, [0, 1, 2], weights(0.1, 0.2))) == [
        "dead-gain"
    ]


def test_what_stops_a_run_is_an_alert():
    assert set(STOPS) == {"nan", "spike"} and all(stop <= ALERTS.keys() for stop in STOPS.values())


@pytest.mark.parametrize("noise", ["normal", "student-t, 3 degrees"])
@pytest.mark.parametrize("resume_from", [10, 100, 777, 1500])
def test_resume_raises_what_an_uninterrupted_run_does(tmp_path, noise, resume_from):
    loss = with_spikes(falling_loss(3000), NOISES[noise], sigma=0.006, heights=(1.08, 1.8), seed=4)
    grad_norm = with_spikes(gradient_norm(3000), NOISES[noise], sigma=0.15, heights=(4, 20), seed=5).values
    start = loss.spikes[0] + 2 if resume_from == 777 else resume_from  # 777: in the middle of a spike
    loss.values[start - 1 : start + 1] = NAN
    path = tmp_path / "monitor.jsonl"

    def train(watch: Watch, first: int, last: int, record: RunRecord | None = None) -> list[Alert]:
        alerts = []
        for step in range(first, last + 1):
            values = loss.values[step].item(), grad_norm[step].item()
            alerts += watch.step(step, *values)
            if record:
                record.step(
                    step, loss=values[0], grad_norm=values[1], learning_rate=None, tokens=1, seconds=1.0
                )
            if step % 50 == 0:
                statistics = {"stream_max_abs": [None, step * 30.0, NAN if start <= step else 1.0]}
                alerts += watch.layers(step, [0, 1, 2], statistics)
                if record:
                    record.layers(step, [0, 1, 2], statistics)
        return alerts

    through = train(Watch(), 1, 2999)
    record = RunRecord.open(path, HEADER, 0)
    train(Watch(), 1, start + 40, record)  # killed 40 steps after the checkpoint
    record = RunRecord.open(path, HEADER, start)
    resumed = Watch()
    resumed.replay(path)
    assert train(resumed, start + 1, 2999, record) == [alert for alert in through if alert.iteration > start]
    assert len([alert for alert in through if alert.kind == "loss-spike"]) >= 5
