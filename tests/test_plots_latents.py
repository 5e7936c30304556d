"""Figures of latents say what the numbers say."""

import numpy as np
import pandas as pd

from saeutils import plots


def test_the_token_in_question_stands_in_one_column():
    rows = [
        ("strongest", ["It", " was", " <b>", "\n"], np.array([0, 0, 8, 2.0]), 2),
        ("quantile 0.5", ["x" * 90, " so"], np.array([1, 4.0]), 1),
        ("quantile 0.5", [" big"], np.array([3.0]), 0),
    ]
    fig = plots.contexts({"latent 7": rows}, title="t", left=30)
    text = fig.data[0]
    at = [x for x, t in zip(text.x, text.text, strict=True) if t in asked_for]
    assert at == [49, 49, 49]
    assert "⏎" in text.text and max(map(len, text.text)) < 20  # what is too far is cut
    notes = [a.text for a in fig.layout.annotations]
    assert notes.count("quantile 0.5") == 1 and "8.00" in notes
    assert "<b>latent 7</b>" in notes
    strong = {s.x0: s.fillcolor for s in fig.layout.shapes if s.y0 < 1}
    assert len(strong) == 2 and strong[49] == "rgb(239, 101, 72)"


asked_for = ("\u00a0&lt;b&gt;", "\u00a0so", "\u00a0big")


def test_a_profile_a_row():
    frame = pd.DataFrame(
        {"token": [" a", " b"], "share": [0.5, 1], "fires": [1, 2], "rows": [2, 2]}
    )
    one = {
        "tokens": frame,
        "positions": ([1, 2, 4], [0, 0.1, 0.2]),
        "logits": ([" up", " down"], np.array([2.0, -1.0])),
        "by chance": (0.5, -0.4),
    }
    fig = plots.latent_profiles({"latent 3": one, "latent 4": one}, title="t")
    assert len(fig.data) == 6
    tokens, positions, logits = fig.data[:3]
    assert list(tokens.y) == ["“\u00a0b”", "“\u00a0a”"] and list(tokens.x) == [100, 50]
    assert list(positions.y) == [0, 10, 20]
    assert list(logits.x) == [-1, 2] and list(logits.y) == [
        "“\u00a0down”",
        "“\u00a0up”",
    ]
    assert len(set(logits.marker.color)) == 2
    dotted = [s.x0 for s in fig.layout.shapes]
    assert sorted(dotted) == [-0.4, -0.4, 0.5, 0.5]
    assert any("latent 4" in a.text for a in fig.layout.annotations)


def test_concepts_stand_in_the_order_given_and_controls_are_grey():
    frame = pd.DataFrame({"concept": ["x", "y"], "SAE": [0.9, 0.4], "null": [0.1, 0.2]})
    fig = plots.concept_scores(
        frame, ["SAE", "null"], title="t", x="F1", controls=["null"]
    )
    assert [trace.name for trace in fig.data] == ["SAE", "null"]
    assert list(fig.data[0].x) == [0.9, 0.4] and list(fig.data[0].y) == ["x", "y"]
    assert list(fig.layout.yaxis.categoryarray) == ["y", "x"]  # the first on top
    assert fig.data[1].marker.color == "#8A8A8A" != fig.data[0].marker.color
