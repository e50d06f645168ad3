"""What the report's page says, without looking at it."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest

from megatron_periln.monitor.alerts import Alert
from megatron_periln.monitor.record import RunRecord
from megatron_periln.report.colors import PALETTES
from tests.report.conftest import TOOL
from tests.report.page import Page
from tests.report.synthetic import write_run

TITLES = [
    "Summary",
    "Loss",
    "Gradient norm",
    "Variance of the residual stream by depth",
    "Largest activation",
    "Gradient norm by layer",
    "Angular distance between consecutive layers",
    "What a sublayer adds, beside the stream",
    "Output-norm weights",
    "Throughput",
    "Flags that differ",
    "Alerts",
]


def test_four_runs(report, four_runs):
    path = report(*four_runs, title="Where norms <b>stand</b>")
    assert path.stat().st_size < 1.6e6
    page = Page(path)
    assert "Where norms <b>stand</b>" in page.text
    assert [heading for heading in page.headings if heading in TITLES] == TITLES
    assert page.loads == ["data:,"]
    summary = {row[0]: row for row in page.table("Run")[1:5]}
    assert summary.keys() == {"pre", "post", "peri", "output"}
    assert summary["peri"][1] == "peri, 12 layers x 256, 9.44M parameters"
    assert summary["peri"][2:4] == ["600", "39.3M"]
    assert summary["peri"][5] == "0" and int(summary["pre"][5]) >= 3
    flags = {row[0]: row[1:] for row in page.table("Flag")[1:]}
    assert flags["lr"] == ["0.002", "0.001", "0.002", "0.002"]
    assert flags["norm-placement"] == ["pre", "post", "peri", "output"]
    assert "seq-length" not in flags and "save" not in flags
    assert "loss-spike" in {row[1] for row in page.table("Run")[6:]} or "loss-spike" in page.text


def test_numbers_are_the_files(report, four_runs):
    page = Page(report(*four_runs))
    entries = [json.loads(line) for line in four_runs[2].read_text().splitlines()]
    layers = [entry for entry in entries if entry["kind"] == "layers"]
    for panel, entry in ((0, layers[0]), (2, layers[-1])):
        (trace,) = [trace for trace in page.traces(f"variance-{panel}") if trace["name"] == "peri"]
        assert trace["x"] == list(range(13))  # without the final norm's output
        assert trace["y"] == pytest.approx(entry["stream_variance"][:13], rel=1e-5)
        assert f"iteration {entry['iteration']}" in trace["hovertemplate"]
    losses = [entry["loss"] for entry in entries if entry["kind"] == "step"]
    (raw,) = [trace for trace in page.traces("loss-0") if trace["name"] == "peri" and "opacity" in trace]
    assert raw["y"] == pytest.approx(losses, rel=1e-5)
    (row,) = [row for row in page.table("Run") if row[0] == "peri"]
    assert float(row[4]) == pytest.approx(np.mean(losses[-10:]), abs=1e-4)
    (weights,) = [
        trace
        for trace in page.traces("output-norm-weights-1")
        if trace["name"] == "peri" and trace["line"]["width"] == 2
    ]
    assert weights["y"] == pytest.approx(layers[-1]["mlp_gain_mean"][1:13], rel=1e-5)
    (gradient,) = [trace for trace in page.traces("layer-gradients-2") if trace["name"] == "peri"]
    both = zip(
        layers[-1]["attention_gradient_norm"][1:13], layers[-1]["mlp_gradient_norm"][1:13], strict=True
    )
    assert gradient["y"] == pytest.approx([math.hypot(*pair) for pair in both], rel=1e-5)


def test_spikes_are_marked(report, four_runs):
    page = Page(report(*four_runs))
    entries = [json.loads(line) for line in four_runs[0].read_text().splitlines()]
    spikes = [entry for entry in entries if entry["kind"] == "alert" and entry["alert"] == "loss-spike"]
    (marks,) = [
        trace for trace in page.traces("loss-0") if trace["name"] == "pre" and trace["mode"] == "markers"
    ]
    assert marks["x"] == [spike["iteration"] for spike in spikes]
    assert marks["y"] == pytest.approx([spike["value"] for spike in spikes], rel=1e-5)
    assert marks["text"] == [spike["message"] for spike in spikes]


def test_the_limit_of_fp16_is_drawn(report, four_runs):
    page = Page(report(*four_runs))
    for panel in ("maximum-0", "maximum-1"):
        limits = [trace for trace in page.figures[panel]["data"] if "meta" not in trace]
        assert [65504, 65504] in [trace["y"] for trace in limits]


def test_looks_are_consistent_and_distinct(report, four_runs, tmp_path):
    second = write_run(tmp_path / "peri2", "peri", name="peri 2", steps=50)
    odd = write_run(tmp_path / "odd", "peri", name="odd", steps=50)
    odd.write_text(odd.read_text().replace('"placement":"peri"', '"placement":"sandwich"'))
    page = Page(report(*four_runs, second, odd))
    looks = {}
    for figure in page.figures:
        for trace in page.traces(figure):
            if trace["mode"] != "markers" and trace.get("opacity", 1) == 1:
                looks.setdefault(trace["name"], set()).add((trace["line"]["color"], trace["line"]["dash"]))
    assert all(len(look) == 1 for look in looks.values())
    assert looks["pre"] == {("@pre", "solid")} and looks["peri 2"] == {("@peri", "dash")}
    assert looks["odd"] == {("@other", "solid")}
    assert len(set.union(*looks.values())) == 6


def luminance(color: str) -> float:
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("theme", PALETTES)
def test_contrast(theme):
    """WCAG 2: 4.5 for text, 3 for lines of figures."""
    palette = PALETTES[theme]
    for name, color in palette.items():
        if name not in ("background", "surface", "grid"):
            for behind in ("background", "surface"):
                low, high = sorted([luminance(color), luminance(palette[behind])])
                assert (high + 0.05) / (low + 0.05) >= (4.5 if name in ("text", "muted", "limit") else 3), (
                    name
                )


@pytest.mark.parametrize("placement", ["pre", "peri"])
def test_one_run(report, tmp_path, placement):
    page = Page(report(write_run(tmp_path / "run", placement)))
    assert "Flags that differ" not in page.headings
    assert ("Output-norm weights" in page.headings) == (placement == "peri")


def test_no_layers(report, tmp_path):
    page = Page(report(write_run(tmp_path / "run", layers=False)))
    assert set(page.figures) == {"loss-0", "gradient-norm-0", "throughput-0"}
    assert "no statistics of layers" in page.text


def test_runs_of_different_depth(report, tmp_path):
    runs = [
        write_run(tmp_path / str(layers), num_layers=layers, name=f"{layers} layers") for layers in (3, 48)
    ]
    page = Page(report(*runs))
    assert [max(trace["x"]) for trace in page.traces("variance-2")] == [3, 48]
    assert "differ in depth" in page.text


def test_nan(report, tmp_path):
    page = Page(
        report(write_run(tmp_path / "run", "pre", nan_from=300), write_run(tmp_path / "all", nan_from=1))
    )
    assert [row[4] for row in page.table("Run")[1:3]] == ["not finite", "not finite"]
    crosses = [trace for trace in page.traces("loss-0") if trace.get("marker", {}).get("symbol") == "x"]
    assert [trace["x"] for trace in crosses] == [[300, 300, 300]]  # loss, gradient norm, and the layer


def test_hundred_thousand_steps(report, tmp_path):
    folder, count = tmp_path / "long", 100_000
    write_run(folder, "pre", steps=100)
    rng = np.random.default_rng(0)
    losses = 3 * np.exp(0.01 * rng.standard_normal(count))
    losses[77_777] = 9.5
    lines = [(folder / "monitor.jsonl").read_text()]
    lines += [
        f'{{"kind":"step","iteration":{step},"loss":{losses[step]},"grad_norm":1.0,"learning_rate":0.1,'
        '"tokens":65536,"seconds":0.5}\n'
        for step in range(101, count)
    ]
    (folder / "monitor.jsonl").write_text("".join(lines))
    copies = []
    for number in range(3):
        copies.append(tmp_path / f"copy{number}")
        copies[-1].mkdir()
        (copies[-1] / "monitor.jsonl").write_text("".join(lines))
    page = report(folder, *copies)
    assert page.stat().st_size < 8e6
    raw = Page(page).traces("loss-0")[0]
    assert 9.5 in raw["y"] and raw["x"][-1] >= count - 100


def test_same_names_are_told_apart(report, tmp_path):
    runs = [write_run(tmp_path / folder, name="run", steps=20) for folder in ("a", "b")]
    (tmp_path / "b" / "a").mkdir()
    runs.append(runs[0].rename(tmp_path / "b" / "a" / "monitor.jsonl"))
    runs[0] = write_run(tmp_path / "a", name="run", steps=20)
    assert [row[0] for row in Page(report(*runs)).table("Run")[1:4]] == [
        "run (a) (1)",
        "run (b)",
        "run (a) (3)",
    ]


def test_resumed_run_with_missing_steps(report, tmp_path):
    path = write_run(tmp_path / "run", steps=30)
    header = json.loads(path.read_text().splitlines()[0])
    record = RunRecord.open(path, header, 40)
    alert = Alert(41, "nan", "</script><script>alert(1)</script>", value=math.nan)
    for step in range(41, 60):
        record.step(step, loss=3.0, grad_norm=1.0, learning_rate=0.0, tokens=1, seconds=0.0)
    record.alert(alert.iteration, alert.kind, alert.message, alert.layer, alert.value)
    page = report(tmp_path / "run")
    assert "</script><script>alert" not in page.read_text()
    text = Page(page).text
    assert "resumed 1 times, the last time at iteration 40" in text
    assert "10 iterations between the first and the last are missing" in text


def test_the_tool_imports_no_torch():
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='tool'); "
        "heavy = {'torch', 'megatron', 'pandas', 'plotly'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, TOOL], check=True)


def test_the_plotting_library_is_plotlys_own_bundle_with_its_license():
    assets = resources.files("megatron_periln.report").joinpath("assets")
    bundle = assets.joinpath("plotly-basic.min.js").read_bytes()
    assert b"plotly.js (basic - minified) v4.1.1" in bundle
    assert hashlib.sha256(bundle).hexdigest() == (
        "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"
    )
    assert "Permission is hereby granted" in assets.joinpath("plotly-LICENSE.txt").read_text()
