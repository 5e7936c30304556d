"""Figures of splitting say what they were given, and nothing overlaps."""

import numpy as np
import pandas as pd

from saeutils import plots
from saeutils.family_tree import Node


def node(sae, above, share=0.5, words=("a", "b"), concept="x", precision=0.9):
    return Node(sae, 0, above, share, 0.5, words, concept, precision, 0.5)


def test_insertions_show_the_share_of_each_bin_that_has_enough():
    cosine = np.array([0.15] * 10 + [0.55] * 20 + [0.95] * 2)
    rate = np.array([1e-3] * 10 + [0.02] * 22)
    change = np.where(np.arange(32) < 15, -1.0, 1.0)
    fig = plots.insertions({"one": (cosine, rate, change)}, title="t", nulls=["one"])
    by_cosine, by_rate = fig.data
    np.testing.assert_allclose(by_cosine.x, [0.15, 0.55])
    np.testing.assert_allclose(by_cosine.y, [100, 25])
    np.testing.assert_allclose(by_rate.y, [100, 100 * 5 / 22])
    assert by_cosine.customdata.tolist() == [10, 20]
    assert "47 % of all" in by_cosine.name and by_cosine.line.dash == "dash"
    edge = plots.insertions({"one": (cosine * 0 + 1, rate, change)}, title="t")
    assert edge.data[0].customdata.tolist() == [32]


def test_paths_share_one_legend():
    frame = pd.DataFrame({"done": [0, 0.5, 1], "fvu": [0.2, 0.4, 0.1], "l0": [4, 5, 6]})
    fig = plots.stitching_paths({"a": frame, "b": frame}, title="t", nulls=["b"])
    assert [t.showlegend for t in fig.data] == [True, False, True, False]
    assert list(fig.data[0].x) == [0, 50, 100]
    assert list(fig.data[1].y) == [4, 5, 6]
    assert fig.data[2].line.dash == "dash" and fig.data[0].line.dash == "solid"


def test_a_tree_has_a_line_for_each_leaf_and_wide_lines_for_large_shares():
    one = [
        node("small", -1),
        node("large", 0, 0.8),
        node("huge", 1, 0.6),
        node("huge", 1, 0.1, precision=0.2),
        node("large", 0, 0.2, concept="y"),
    ]
    fig = plots.family_trees([one, one[:2]], title="t")
    names = {a.text for a in fig.layout.annotations if a.y > 0.5}
    assert names == {"<b>small</b>", "<b>large</b>", "<b>huge</b>"}
    placed = [(a.x, a.y) for a in fig.layout.annotations if a.y <= 0.5]
    assert len(placed) == len(set(placed)) == 7
    for x in range(3):
        heights = sorted(y for at, y in placed if at == x)
        assert min(np.diff(heights), default=1) >= 0.9
    widths = [shape.line.width for shape in fig.layout.shapes]
    assert widths[0] > widths[3] > widths[2]
    colours = [shape.line.color for shape in fig.layout.shapes]
    assert colours[0] == colours[1] != colours[3] != colours[2]


def test_words_of_a_tree_are_cut_to_fit_and_marked_up_nowhere():
    words = ("<b>", "a" * 20, "b" * 20)
    fig = plots.family_trees([[node("s", -1, words=words)]], title="t")
    (text,) = (a.text for a in fig.layout.annotations if "x 90" in a.text)
    assert "&lt;b&gt;" in text and "a" * 20 in text and "b" * 20 not in text
    blank = plots.family_trees([[node("s", -1, words=(" ", "\n"))]], title="t")
    assert any("␣ ⏎" in a.text or "␣ ␣" in a.text for a in blank.layout.annotations)
