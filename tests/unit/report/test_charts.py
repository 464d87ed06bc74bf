import math

import pytest
from steadyhelm.report.charts import Chart, Series, draw, moving_mean, nice_ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0.62, 0.97, [0.6, 0.7, 0.8, 0.9, 1.0]),
        (-3.0, 41.0, [-20.0, 0.0, 20.0, 40.0, 60.0]),
        (2e-5, 5e-5, [2e-5, 3e-5, 4e-5, 5e-5]),
        (0.0, 0.0, [-0.5, -0.25, 0.0, 0.25, 0.5]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, ticks: list[float]):
    assert nice_ticks(low, high) == ticks


def test_one_value_repeated_has_ticks_around_it():
    ticks = nice_ticks(0.9, 0.9)
    assert ticks[0] < 0.9 < ticks[-1]


def test_the_moving_mean_leaves_gaps_out():
    assert moving_mean([1.0, 3.0, math.nan, 5.0], 2) == [1.0, 2.0, 3.0, 5.0]
    assert math.isnan(moving_mean([math.nan], 2)[0])


def test_a_line_runs_from_corner_to_corner_and_breaks_at_a_gap():
    figure = draw(Chart(title="t", series=(Series(name="s", points=((0, 0.0), (1, math.nan), (2, 0.5), (4, 1.0))),)))
    assert 'd="M46.0 196.0M248.0 103.0L450.0 10.0"' in figure
    assert "<b>1</b>" in figure


def test_a_chart_of_nothing_is_not_drawn():
    assert draw(Chart(title="t", series=(Series(name="s", points=()),))) == ""
    assert draw(Chart(title="t", series=(Series(name="s", points=((1, math.nan),)),))) == ""


def test_many_points_get_a_moving_mean_over_the_raw_line():
    points = tuple((float(i), float(i % 2)) for i in range(40))
    figure = draw(Chart(title="t", series=(Series(name="s", points=points),)))
    assert figure.count('class="raw s1"') == 1
    assert figure.count('class="line s1"') == 1


def test_a_band_is_drawn_behind_its_line():
    series = Series(name="s", points=((0, 0.5), (1, 0.5)), band=((0, 0.0, 1.0), (1, 0.0, 1.0)))
    figure = draw(Chart(title="t", series=(series,), percent=True))
    assert 'points="46.0,10.0 450.0,10.0 450.0,196.0 46.0,196.0"' in figure
    assert "50.0 %" in figure
