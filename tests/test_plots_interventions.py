"""Figures of edits show every number once, where it belongs."""

import numpy as np
import pandas as pd

from saeutils import plots


def test_every_version_has_a_dot_for_every_token():
    p = {"untouched": np.array([0.5, 0.1]), "steered": np.array([0.2, 0.7])}
    fig = plots.shifted_tokens([" <sad", "\n"], p, marked=[True, False], title="t")
    dots = {t.name: list(t.x) for t in fig.data if t.mode == "markers"}
    assert dots == {"untouched": [0.5, 0.1], "steered": [0.2, 0.7]}
    assert list(fig.layout.yaxis.ticktext) == ["<b>“&lt;sad”</b>", "“⏎”"]
    spans = [tuple(t.x) for t in fig.data if t.mode == "lines"]
    assert spans == [(0.2, 0.5), (0.1, 0.7)]


def test_marked_latents_stand_apart_and_none_is_drawn_twice():
    before, after = np.array([0, 0.5, 2.0]), np.array([1.0, 0.5, 0])
    fig = plots.before_after(before, {"a": after, "b": before}, {"x": [0]}, title="t")
    dots = [t for t in fig.data if t.mode == "markers"]
    assert [(t.name, len(t.x)) for t in dots] == [("other latents", 2), ("x", 1)] * 2
    assert list(dots[1].x) == [1e-3] and list(dots[1].y) == [1.0]  # drawn at the floor
    assert list(dots[0].y) == [0.5, 1e-3]
    assert sum(bool(t.showlegend) for t in fig.data) == 3


def test_moved_points_share_their_axes():
    ground = np.random.default_rng(0).normal(size=(40, 2))
    panels = {"one": {"g": ground[:5]}, "two": {"g": ground[5:9], "h": ground[9:]}}
    fig = plots.moved_points(panels, ground, title="t")
    assert fig.layout.xaxis.range == fig.layout.xaxis2.range
    named = [(t.name, len(t.x)) for t in fig.data]
    assert named == [("all", 40), ("g", 5), ("all", 40), ("g", 4), ("h", 31)]
    assert sum(bool(t.showlegend) for t in fig.data) == 3


def test_ranges_are_means_with_the_spread_of_runs():
    rows = [("a", 1, 2.0), ("a", 1, 4.0), ("a", 10, 5.0), ("null", 1, 0.0)]
    frame = pd.DataFrame(rows, columns=["name", "x", "y"])
    levels = {"whole": 0.99, "all": 1.0, "half": 0.5}
    fig = plots.ranges(frame, x="x", y="y", title="t", controls=["null"], levels=levels)
    line = fig.data[0]
    assert list(line.y) == [3.0, 5.0]
    assert list(line.error_y.array) == [1.0, 0.0] == list(line.error_y.arrayminus)
    assert fig.data[1].line.dash == "dash"
    assert list(fig.layout.xaxis.tickvals) == [1, 10]
    texts = [a.text for a in fig.layout.annotations]
    assert texts == ["half", "whole; all"]  # those that coincide are named once
    logged = plots.ranges(
        frame, x="x", y="y", title="t", levels={"l": 10.0}, log_y=True
    )
    assert logged.layout.annotations[0].y == 1.0


def test_success_and_cost_stand_on_the_same_lines():
    frame = pd.DataFrame(
        {
            "concept": ["joy", "joy", "place", "place"],
            "arm": ["none", "latent"] * 2,
            "rate": [0.1, 0.4, 0.2, 0.3],
            "low": [0.05, 0.3, 0.1, 0.2],
            "high": [0.2, 0.5, 0.3, 0.5],
            "nats": [1.0, 2.0, 1.0, 1.5],
            "nats_error": [0.1] * 4,
        }
    )
    fig = plots.success_rates(frame, title="t", controls=["none"])
    left, right = fig.data[2], fig.data[3]
    assert left.name == right.name == "latent" and list(left.y) == list(right.y)
    assert list(left.x) == [0.4, 0.3] and list(right.x) == [2.0, 1.5]
    assert np.allclose(left.error_x.array, [0.1, 0.2])
    assert np.allclose(left.error_x.arrayminus, [0.1, 0.1])
    heights = [y for t in fig.data[::2] for y in t.y]
    assert len(set(heights)) == 4  # no two arms on one line
