"""The report in headless Chromium."""

from __future__ import annotations

import functools
import json
import os
import re

import pytest

from tests.report.browser import DESKTOP, PHONE, chromium, executable, open_report

pytestmark = pytest.mark.skipif(
    executable() is None and "CI" not in os.environ, reason="there is no Chromium to open the report with"
)

DEVICES = {"desktop": DESKTOP, "phone": PHONE}
each_device = pytest.mark.parametrize("device", DEVICES)

DRAWN = """() => Object.fromEntries([...document.querySelectorAll('.plot')].map(plot => [plot.id,
    plot.querySelectorAll('.scatterlayer > .trace').length]))"""
# On a phone the heads of tables are for screen readers only.
OUTSIDE = """() => [...document.querySelectorAll('main *, header *')].filter(element => {
    const box = element.getBoundingClientRect(), head = element.closest('thead');
    return box.width > 0 && (box.left < -1 || box.right > document.documentElement.clientWidth + 1)
        && !element.closest('.plot') && !(head && getComputedStyle(head).position === 'absolute');
}).map(element => element.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def page(tool, four_runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert tool.main([*map(str, four_runs), "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def opened_on(browser, page):
    """Return the report as a device shows it; opened once."""
    return functools.cache(lambda device: open_report(browser, page, **DEVICES[device]))


def expected_traces(path):
    text = path.read_text(encoding="utf-8")
    figures = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["figures"]
    return {name: len(figure["data"]) for name, figure in figures.items()}


@each_device
def test_everything_is_drawn_without_errors_or_network(opened_on, page, device):
    opened = opened_on(device)
    assert opened.page.evaluate(DRAWN) == expected_traces(page)
    assert opened.errors == []
    assert [url for url in opened.requests if not url.startswith(("data:", "blob:"))] == [
        page.absolute().as_uri()
    ]


@each_device
def test_nothing_is_wider_than_the_screen(opened_on, device):
    opened = opened_on(device)
    assert opened.page.evaluate(OUTSIDE) == []
    width = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert opened.page.evaluate(width) == 0


def test_what_is_too_wide_is_noticed(browser, page, tmp_path):
    wide = tmp_path / "wide.html"
    wide.write_text(
        page.read_text(encoding="utf-8").replace("<main>", '<main><p style="min-width:2000px">wide</p>')
    )
    assert open_report(browser, wide, **DESKTOP).page.evaluate(OUTSIDE) != []


def test_what_fails_is_noticed(browser, page, tmp_path):
    text = page.read_text(encoding="utf-8")
    faults = {
        "undefined_name": ("draw().then(", "draw(undefined_name).then("),
        "Content Security Policy": ("<main>", '<main><img src="https://127.0.0.1:9/x.png">'),
    }
    for told, (right, wrong) in faults.items():
        assert right in text
        broken = tmp_path / "broken.html"
        broken.write_text(text.replace(right, wrong), encoding="utf-8")
        assert told in " ".join(open_report(browser, broken, **DESKTOP).errors)


def test_a_run_can_be_hidden(opened_on):
    shown = "() => document.querySelectorAll('#loss-0 .scatterlayer > .trace').length"
    opened = opened_on("desktop")
    everything = opened.page.evaluate(shown)
    button = opened.page.get_by_role("button", name="peri")
    button.click()
    opened.page.wait_for_function(f"({shown})() < {everything}")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    opened.page.wait_for_function(f"({shown})() === {everything}")
    assert opened.errors == []


def test_it_prints_on_pages(opened_on, tmp_path):
    opened = opened_on("desktop")
    opened.page.pdf(path=tmp_path / "report.pdf", format="A4", prefer_css_page_size=True)
    assert opened.errors == []
    content = (tmp_path / "report.pdf").read_bytes()
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12
