"""Charts and pictures: marks stand where the data are, ticks are round, text is escaped."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import write_run
from report_text import Shape

from wsae.report.charts import (
    BOTTOM,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    AxisScale,
    Chart,
    density_figures,
    explained_figures,
    linear_ticks,
    log_ticks,
    scale,
    thinned,
    tick_text,
)
from wsae.report.rundata import read_run

LOW = st.floats(-1e6, 1e6)


@given(LOW, st.floats(1e-3, 1e6))
def test_linear_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    ticks = linear_ticks(low, low + span)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in ticks)
    steps = np.diff(ticks)
    lead = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert np.isclose(lead, [1, 2, 2.5, 5, 10], rtol=1e-3).any()


@given(st.floats(1e-8, 1e4), st.floats(1.3, 1e8))
def test_log_ticks_are_few_and_inside(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert 1 <= len(ticks) <= 9
    assert all(low * (1 - 1e-6) <= t <= low * factor * (1 + 1e-6) for t in ticks)


@given(st.lists(st.floats(-1e9, 1e9), max_size=5), st.booleans())
def test_axis_covers_its_finite_values(values: list[float], log: bool) -> None:
    built = scale("x", [*values, float("nan"), float("inf")], log=log)
    assert built.low < built.high
    for value in (v for v in values if v > 1e-100 or not log):
        assert 0 <= built.unit(value) <= 1
        assert built.low <= value * (1 + 1e-9) or not log


def test_points_stand_where_the_data_are() -> None:
    chart = Chart("t", AxisScale("x", 0, 10), AxisScale("y", 1, 100, log=True), 440, 280)
    chart.line([0, 10], [1, 100], "s1")
    chart.line([0, 5, 10], [1, float("nan"), 10], "s2")
    root = ET.fromstring(chart.svg())
    paths = {path.get("class"): path.get("d") for path in root.iter("path")}
    assert paths["line s1"] == f"M{LEFT}.0 {280 - BOTTOM}.0L{440 - RIGHT}.0 {TOP}.0"
    assert (
        paths["line s2"]
        == f"M{LEFT}.0 {280 - BOTTOM}.0M{440 - RIGHT}.0 {(280 - BOTTOM + TOP) / 2:.1f}"
    )


@given(st.text())
def test_text_in_charts_is_never_markup(text: str) -> None:
    chart = Chart(text, AxisScale(text, 0, 1), AxisScale(text, 0, 1))
    chart.spot(0.5, 0.5, "s1", text, text)
    chart.points([0.1], [0.2], "s2", text)
    svg = str(chart.svg())
    assert set(re.findall(r"<(/?\w+)", svg)) == {
        "svg", "/svg", "line", "text", "/text", "circle", "/circle", "title", "/title", "path", "/path",
    }  # fmt: skip


def test_notes_never_cover_each_other() -> None:
    chart = Chart("t", AxisScale("x", 0, 1), AxisScale("y", 0, 1))
    for i in range(20):
        chart.spot(0.5 + i / 1000, 0.5, "s1", f"tip {i}", f"note {i}")
    svg = str(chart.svg())
    assert svg.count(">note ") == 1
    assert svg.count("<title>tip ") == 20, "every spot keeps its tooltip"


def test_histogram_counts_every_latent_dead_ones_apart(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    figures = density_figures(run, "layers.9")
    assert [figure.title for figure in figures] == [
        "variance-a1 beside plain",
        "variance-a0.5 beside plain",
    ]
    density = run.array("layers.9", "variance-a1", "density")
    assert density is not None
    assert f"variance-a1: {int((density == 0).sum())} dead latents" in figures[0].svg
    root = ET.fromstring(figures[0].svg)
    drawn = [p for p in root.iter("path") if p.get("class") == "steps s1"][1]
    heights = [float(v) for v in re.findall(r"V([\d.]+)H", drawn.get("d") or "")]
    top = re.findall(r'class="grid"[^>]*y1="([\d.]+)"', figures[0].svg)
    ticks = [float(t) for t in re.findall(r'class="tick end"[^>]*>([\d.]+)<', figures[0].svg)]
    pixels = (float(top[0]) - float(top[-1])) / (ticks[-1] - ticks[0])
    counted = sum((float(top[0]) - height) / pixels for height in heights)
    assert counted == pytest.approx((density > 0).sum(), rel=0.01)


def test_explained_scatter_has_a_point_per_dimension(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", Shape(d_in=50)))
    svg = explained_figures(run, "layers.9")[0].svg
    assert svg.count("h0") == 50


@given(st.integers(1, 10_000))
def test_thinning_keeps_the_ends(count: int) -> None:
    kept = thinned(count)
    assert kept[0] == 0
    assert kept[-1] == count - 1
    assert len(kept) == min(count, MAX_POINTS)


def test_tick_text() -> None:
    cases = {0.25: "0.25", 40_000.0: "40k", 2e6: "2M", 1e-5: "1e−5", -0.5: "−0.5", 0.0: "0"}
    assert {value: tick_text(value) for value in cases} == cases
