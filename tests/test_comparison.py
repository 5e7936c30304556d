"""Differences over seeds: known answers, the interval's coverage, bad input."""

import numpy as np
import pandas as pd
import pytest

from saeutils import plots
from saeutils.comparison import in_words, paired_differences


def runs(**values):
    rows = [
        dict(name=name, seed=seed, loss=value, gain=-value)
        for name, column in values.items()
        for seed, value in enumerate(column)
    ]
    return pd.DataFrame(rows)


BETTER = {"loss": -1, "gain": 1}


def test_known_answer_for_three_seeds():
    frame = runs(plain=[10, 20, 30], other=[9, 18, 27])  # differences −1, −2, −3
    table = paired_differences(frame, "plain", {"loss": -1})
    (row,) = table.itertuples()
    assert (row.name, row.column, row.runs) == ("other", "loss", 3)
    assert (row.value, row.difference) == (18, -2)
    half = 4.302653 * 1 / 3**0.5  # t of two degrees of freedom, sd 1
    assert row.low == pytest.approx(-2 - half) and row.high == pytest.approx(-2 + half)
    assert row.verdict == "unclear"


def test_pairing_finds_what_the_spread_over_seeds_hides():
    g = np.random.default_rng(0)
    base = g.normal(0, 10, 6)
    frame = runs(plain=base, lower=base - 1 + g.normal(0, 0.1, 6), same=base)
    table = paired_differences(frame, "plain", BETTER).set_index(["name", "column"])
    assert table.loc[("lower", "loss"), "verdict"] == "better"
    assert table.loc[("lower", "gain"), "verdict"] == "better"
    assert table.loc[("same", "loss"), "verdict"] == "unclear"
    worse = paired_differences(frame, "lower", BETTER).set_index(["name", "column"])
    assert worse.loc[("plain", "loss"), "verdict"] == "worse"


def test_order_of_rows_does_not_matter():
    frame = runs(plain=[1, 2, 3], other=[3, 5, 4])
    shuffled = frame.sample(frac=1, random_state=1)
    a, b = (
        paired_differences(f, "plain", BETTER).set_index(["name", "column"])
        for f in (frame, shuffled)
    )
    pd.testing.assert_frame_equal(a.sort_index(), b.sort_index())


def test_the_interval_holds_as_often_as_it_says():
    g = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        frame = runs(plain=g.normal(size=4), other=0.5 + g.normal(size=4))
        (row,) = paired_differences(frame, "plain", {"loss": -1}).itertuples()
        hits += row.low < 0.5 < row.high
    assert 0.92 < hits / 400 < 0.98


def test_one_seed_and_nan_are_unclear():
    (row,) = paired_differences(
        runs(plain=[1], other=[5]), "plain", {"loss": -1}
    ).itertuples()
    assert row.verdict == "unclear" and np.isnan(row.low)
    frame = runs(plain=[1, 2], other=[np.nan, 2])
    (row,) = paired_differences(frame, "plain", {"loss": -1}).itertuples()
    assert row.verdict == "unclear"


def test_what_is_refused():
    frame = runs(plain=[1, 2], other=[3, 4])
    with pytest.raises(ValueError, match="no column 'speed'"):
        paired_differences(frame, "plain", {"speed": 1})
    with pytest.raises(ValueError, match="no run is named 'nothing'"):
        paired_differences(frame, "nothing", BETTER)
    with pytest.raises(ValueError, match="two runs share name"):
        paired_differences(pd.concat([frame, frame]), "plain", BETTER)
    with pytest.raises(ValueError, match=r"'other' has .* each difference needs both"):
        paired_differences(frame.iloc[:3], "plain", BETTER)


def test_words_and_figure_say_what_the_table_says():
    frame = runs(plain=[1, 2, 3], low=[0.5, 1.51, 2.49], odd=[3, 1, 3])
    table = paired_differences(frame, "plain", BETTER)
    assert in_words(table, "loss") == (
        "low −0.50 ± 0.02 (better); odd +0.33 ± 3.79 (unclear)"
    )
    fig = plots.intervals(table, title="Title", subtitle="what to know")
    titles = [t.text for t in fig.layout.annotations]
    assert titles == ["<b>loss (less is better)</b>", "<b>gain (more is better)</b>"]
    drawn = {(t.xaxis, t.name): (t.x, t.error_x.array) for t in fig.data}
    x, half = drawn["x", "better"]
    assert list(x) == pytest.approx([-0.5]) and half[0] == pytest.approx(0.0248, 0.01)
    assert set(drawn) == {(a, v) for a in ("x", "x2") for v in ("better", "unclear")}
    assert sum(t.showlegend for t in fig.data) == 2
    one = plots.intervals(table, title="Title", columns=["gain"])
    assert {t.xaxis for t in one.data} == {"x"}
