"""Figures of text say what the numbers say."""

import numpy as np
import pandas as pd

from saeutils import plots


def test_each_token_stands_on_a_ground_as_strong_as_its_value():
    tokens = ["Tom", " saw", " <b>", "\n", "It"]
    values = np.array([np.nan, 0, 1, 4, 2], np.float32)
    fig = plots.highlighted({"one": (tokens, values)}, title="t", unit="nats", high=4)
    assert len(fig.layout.shapes) == 3  # neither NaN nor 0 has a ground
    strongest = {s.x0: s.fillcolor for s in fig.layout.shapes}
    assert len(set(strongest.values())) == 3
    text = fig.data[0]
    assert text.text[2] == "\u00a0&lt;b&gt;" and text.text[3] == "⏎"
    assert list(text.x[:4]) == [0, 3, 7, 11]
    assert text.x[4] == 0 and text.y[4] == text.y[3] + 1  # a new line of the story
    assert "1.00 nats" in text.hovertext[2]


def test_long_texts_are_wrapped_between_tokens():
    fig = plots.highlighted(
        {"one": ([" word"] * 30, np.ones(30)), "two": (["x"], [1.0])},
        title="t",
        unit="u",
        columns=40,
    )
    text = fig.data[0]
    assert max(text.x) + 5 <= 40
    assert sorted(set(text.y[:30])) == [1, 2, 3, 4]
    assert text.y[30] > 4 and len(fig.layout.annotations) == 2


def test_curves_and_levels():
    fig = plots.curves(
        {"a": ([1, 2], [3.0, 2.0])}, x="x", y="y", title="t", levels={"null": 4.0}
    )
    assert list(fig.data[0].y) == [3.0, 2.0]
    assert fig.layout.shapes[0].y0 == 4.0
    assert fig.layout.xaxis.title.text == "x"


def test_effects_have_one_line_a_name_and_one_symbol_a_treatment():
    frame = pd.DataFrame({"name": ["p", "q"], "zero": [2.0, 1.0], "mean": [0.5, 0.1]})
    fig = plots.effects(
        frame, {"zero": "zeros", "mean": "the mean"}, x="nats", title="t"
    )
    assert [trace.name for trace in fig.data] == ["zeros", "the mean"]
    assert list(fig.data[1].x) == [0.5, 0.1] and list(fig.data[1].y) == ["p", "q"]
    assert len({trace.marker.symbol for trace in fig.data}) == 2


def test_attention_patterns_are_drawn_a_panel_a_head():
    a, b = np.eye(12)[None].repeat(3, 0), np.eye(12)[None].repeat(2, 0)
    fig = plots.attention_patterns({"A": a, "B": b}, title="t", positions=8)
    assert len(fig.data) == 5
    assert fig.data[0].z.shape == (8, 8) and fig.data[0].z[3, 3] == 1
    assert fig.layout.yaxis.autorange == "reversed"
