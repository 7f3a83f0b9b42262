"""The report: one page that needs nothing else, shown by a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from finegraft.report import GraftedSite, RunReport, render_report
from finegraft.report.chart import line_chart, ticks

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def report(**changes: object) -> RunReport:
    sites = [
        GraftedSite(f"layer.{layer}.{role}", role, layer, "low-rank", trained)
        for layer in range(3)
        for role, trained in (("q", 1000), ("up", 4000))
    ]
    settings: dict[str, object] = {
        "title": "one: lora on <base>",
        "summary": [("trainable parameters", "15,050 of 1,000,000 (1.50%)"), ("accuracy after", "0.8671")],
        "losses": [(step, 1.0 / step) for step in range(1, 400)],
        "scores": [(0, 0.5), (200, 0.8), (399, 0.8671)],
        "headline": "accuracy",
        "sites": [*sites, GraftedSite("classifier", "head", None, "replacement", 50)],
        "metrics": [("accuracy", "0.5000", "0.8671")],
        "documents": {"config.yaml": "base: <base>\n"},
        "environment": {"torch": "2.13"},
    }
    return RunReport(**(settings | changes))


class Page(HTMLParser):
    """Collects what a page refers to, and checks that elements nest."""

    void = ("meta", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.references += [str(given[name]) for name in ("src", "href") if name in given]
        self.ids |= {str(given["id"])} if "id" in given else set()
        self.labels += str(given.get("aria-labelledby") or "").split()
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element without content, such as a line of a chart."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_small_and_needs_nothing_else() -> None:
    text = render_report(report())
    page = Page(text)
    assert page.open == []
    assert page.references == ["data:,"]
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert set(page.labels) <= page.ids
    assert len(text.encode()) < 60_000
    assert "<base>" not in text
    assert "&lt;base&gt;" in text


def test_the_page_stays_small_for_long_runs_of_deep_models() -> None:
    sites = [
        GraftedSite(f"m.{i}.{r}", r, i, "low-rank", 10) for i in range(80) for r in ("q", "k", "v", "o", "up", "down")
    ]
    losses = [(step, 1.0 / step) for step in range(1, 401)]
    assert len(render_report(report(sites=sites, losses=losses)).encode()) < 200_000


def test_what_was_grafted_is_counted_by_role_and_layer() -> None:
    text = re.sub(r"<[^>]*>", " ", render_report(report()))
    rows = [line.split() for line in text.splitlines() if line.strip()]
    assert ["up", "4,000", "4,000", "4,000", "–"] in rows
    assert ["head", "–", "–", "–", "50"] in rows
    assert "7 sites, low-rank, replacement" in text


def test_both_displays_have_readable_colours() -> None:
    style = render_report(report()).split("<style>")[1].split("</style>")[0]
    light, dark = re.findall(r":root \{([^}]*)\}", style)
    for palette in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", palette))
        for ink in ("ink", "faint", "leaf-ink"):
            for ground in ("ground", "panel"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground, palette)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.21, 0.48, [0.2, 0.3, 0.4, 0.5]), (3, 3, None), (0, 0, None)],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float] | None) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low
    assert high <= marks[-1]
    assert marks[0] < marks[-1]
    assert expected is None or marks == pytest.approx(expected)


def test_charts_draw_what_they_are_given() -> None:
    svg = line_chart([(0, 1.0), (5, 0.0), (10, float("nan"))], title="t", x_label="step", y_label="loss", markers=True)
    assert svg.count("<circle") == 2
    first, last = re.search(r'points="([^"]*)"', svg)[1].split()
    assert float(first.split(",")[0]) < float(last.split(",")[0])
    assert float(first.split(",")[1]) < float(last.split(",")[1])  # svg counts downwards
    assert "loss goes from 1 at step 0 to 0 at step 5" in svg
    assert line_chart([], title="t", x_label="x", y_label="y") == ""


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed; the report is not shown in a browser")
def test_a_browser_shows_the_figures_without_complaint(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_report(report()))
    common = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=2000",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [*common, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert "CONSOLE" not in done.stderr
    assert "0.8671" in done.stdout
    assert done.stdout.count("<svg") == 2
    picture = tmp_path / "report.png"
    subprocess.run(
        [*common, "--window-size=1000,1400", f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        timeout=60,
        check=True,
        cwd=tmp_path,
    )
    assert picture.stat().st_size > 20_000, "the picture is nearly empty"
