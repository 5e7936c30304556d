"""What the figures carry: the right numbers in the right place, never by position."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
import torch

from saeutils import plots
from saeutils.plots import maps


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(latent, values, ids, labels=None):
    as_labels = None if labels is None else torch.tensor(labels)
    return SimpleNamespace(
        latent=latent,
        values=torch.tensor(values),
        ids=torch.tensor(ids),
        labels=as_labels,
    )


def pictures(images, ids):
    return SimpleNamespace(images=images, ids=torch.tensor(ids))


SAID = dict(names=["a", "b"], before=torch.eye(2), after=torch.eye(2), title="t")


def firing_density(**changes):
    values = dict(
        edges=np.array([-2.0, -1, 0]), counts=np.array([1, 2]), dead=1, n_rows=100
    )
    return SimpleNamespace(**(values | changes))


RUNS = pd.DataFrame(
    {
        "name": ["naive", "naive", "tied", "naive"],
        "lr": [0.1, 0.2, 0.1, 0.1],
        "dead %": [80.0, 70.0, 1.0, 90.0],
        "FVU": [0.5, 0.4, 0.1, 0.6],
    }
)

EVERY_FIGURE = {
    "loss": lambda: plots.loss_curves(
        {"a": pd.DataFrame({"step": [0, 1], "fvu": [1.0, 0.5]})}
    ),
    "table": lambda: plots.scorecard_table(
        pd.DataFrame({"name": ["a", "b"], "FVU": [0.1, math.nan], "rows": [5, 5]})
    ),
    "dots": lambda: plots.dots(
        pd.DataFrame({"name": ["a", "b"], "FVU": [0.1, 0.2]}), "FVU", title="t"
    ),
    "ladder": lambda: plots.ladder(RUNS, ["dead %", "FVU"], group="lr", title="t"),
    "density": lambda: plots.density({"a": firing_density()}),
    "cumulative": lambda: plots.cumulative(
        {"a": normal(9), "none": torch.tensor([math.nan])},
        title="t",
        x="x",
        limits=(-3.0, 3.0),
        nulls=["none"],
    ),
    "profile": lambda: plots.class_profile(torch.eye(2), [3, 8], [5, 6]),
    "grid": lambda: plots.image_grid(torch.zeros(2, 3, 28, 28), title="t"),
    "top": lambda: plots.top_images(
        [example(0, [1.0], [5])], pictures(torch.zeros(1, 28, 28), [5])
    ),
    "strips": lambda: plots.reconstructions(normal(2, 9), normal(2, 9), **SAID),
    "pca": lambda: plots.pca_map(
        {"row": (normal(9, 2), [0.2, 0.1], np.arange(9) - 1)}, title="t"
    ),
    "cosines": lambda: plots.cosine_map({"row": (normal(9, 4), range(9))}, title="t"),
    "angles": lambda: plots.cosine_histogram({"a": normal(9, 4)}),
}


@pytest.mark.parametrize("name", EVERY_FIGURE)
def test_every_figure_builds_has_a_title_and_leaves_global_settings_alone(name):
    before = pio.templates.default
    fig = EVERY_FIGURE[name]()
    assert fig.layout.title.text
    assert len(fig.to_json()) > 500
    assert pio.templates.default == before


# --- scores -------------------------------------------------------------------


def test_density_bars_add_up_and_the_dead_stand_apart():
    fig = plots.density({"a": firing_density()})
    bars, dead = fig.data
    assert bars.y.sum() + dead.y[0] == pytest.approx(100)
    assert dead.y[0] == 25 and dead.text == ("1 dead",)
    assert dead.x[0] < -2 - dead.width / 2
    assert "100 rows" in fig.layout.title.subtitle.text


def test_seeds_share_a_colour_and_one_legend_entry():
    run = pd.DataFrame({"step": [0, 1], "fvu": [1.0, 0.5]})
    fig = plots.loss_curves({"a": [run, run], "b": run})
    assert [t.showlegend for t in fig.data] == [True, False, True]
    colours = [t.line.color for t in fig.data]
    assert colours[0] == colours[1] != colours[2]


def test_table_cells():
    frame = pd.DataFrame(
        {"name": ["a", "a"], "FVU": [0.12345, math.nan], "n": [1, 60000]}
    )
    fig = plots.scorecard_table(frame)
    assert fig.data[0].cells["values"] == (
        ["<b>FVU</b>", "<b>n</b>"],
        ["0.123", "1"],
        ["–", "60,000"],
    )
    fig = plots.scorecard_table(frame, metrics_as_rows=False)
    assert fig.data[0].cells["values"] == (
        ["<b>a</b>", "<b>a</b>"],
        ["0.123", "–"],
        ["1", "60,000"],
    )


def test_cumulative_reaches_the_right_heights():
    values = torch.tensor([1.0, 2, 3, 4, math.nan])
    line, median = plots.cumulative(
        {"a": values}, title="t", x="x", limits=(0.0, 10.0)
    ).data
    assert tuple(line.x) == (0, 1, 2, 3, 4, 10)
    assert tuple(line.y) == (0, 25, 50, 75, 100, 100)
    assert (median.x[0], median.y[0]) == (2.5, 50)
    assert "n = 4" in line.name


def test_class_profile_is_in_percent_and_a_dead_latent_is_empty():
    fig = plots.class_profile([[1.0, 3], [0, 0]], [0, 1], [7, 9])
    assert fig.data[0].z.tolist() == [[25, 75], [0, 0]]
    assert fig.data[0].y == ("latent 7", "latent 9")


# --- images -------------------------------------------------------------------


def test_top_images_are_joined_by_id_and_never_filled_up():
    """Image i is all i; the ids are in another order than the images."""
    images = torch.arange(1, 5, dtype=torch.uint8)[:, None, None].expand(4, 28, 28)
    chosen = [example(3, [9.0, 8], [99, 10], [1, 2]), example(4, [7.0], [40], [0])]
    fig = plots.top_images(chosen, pictures(images, [70, 10, 99, 40]), n=3)
    z = fig.data[0].z
    pitch = z.shape[0] // 2
    corners = [[int(z[i * pitch, j * 31]) for j in range(3)] for i in range(2)]
    assert corners == [[3, 2, 0], [4, 0, 0]]
    texts = [a.text for a in fig.layout.annotations]
    assert texts == [
        "1 · 9<br>#99",
        "2 · 8<br>#10",
        "0 · 7<br>#40",
        "latent 3",
        "latent 4",
    ]


def test_an_example_without_image_is_an_error():
    with pytest.raises(ValueError, match="image 8 is not among the 1 images"):
        plots.top_images(
            [example(0, [1.0], [8])], pictures(torch.zeros(1, 28, 28), [5])
        )


def test_boxes_frame_the_pixels_that_they_name():
    images = torch.zeros(2, 3, 8, 8)
    boxes = [[None] * 3, [None, (4, 2, 3, 5), None]]
    fig = plots.image_grid(images, boxes=boxes, title="t")
    (frame,) = fig.layout.shapes
    images[1, 1, 4:7, 2:7] = 1
    rows, columns = np.nonzero(plots.image_grid(images, title="t").data[0].z)
    assert (frame.y0, frame.y1) == (rows.min() - 0.5, rows.max() + 0.5)
    assert (frame.x0, frame.x1) == (columns.min() - 0.5, columns.max() + 0.5)


def test_image_grid_keeps_every_pixel_in_its_cell():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    captions = [["x"] * 3] * 2
    z = plots.image_grid(images, captions=captions, title="t", cell=20).data[0].z
    pitch = z.shape[0] // 2
    assert pitch > 4
    for i in range(2):
        for j in range(3):
            got = z[i * pitch : i * pitch + 4, j * 8 : j * 8 + 5]
            assert np.array_equal(got, images[i, j])


def test_strips_alternate_and_are_drawn_on_one_scale():
    x, y = torch.tensor([[0.0, 1], [2, 3]]), torch.tensor([[0.5, 1], [2, 2]])
    fig = plots.reconstructions(x, y, **SAID | {"after": torch.eye(2).flip(1)})
    heat = fig.data[0]
    assert heat.z[[0, 3]].tolist() == x.tolist()
    assert heat.z[[1, 4]].tolist() == y.tolist()
    assert np.isnan(heat.z[2]).all() and len(heat.z) == 5
    assert heat.zmin == 0
    texts = [a.text for a in fig.layout.annotations]
    assert texts[:3] == ["a", "b", "says 0 (100.0%)<br>then 1 (100.0%)"]
    assert plots.reconstructions(-x, y, **SAID).data[0].zmin < 0


# --- directions ---------------------------------------------------------------


@pytest.mark.parametrize("d", [3, 16, 128])
def test_the_null_density_is_that_of_random_directions(d):
    n = 300
    cosines, pair, nearest = maps.null_cosines(d, n)
    width = cosines[1] - cosines[0]
    assert pair.sum() * width == pytest.approx(1, abs=0.02)
    assert (cosines**2 * pair).sum() * width == pytest.approx(1 / d, rel=0.03)
    unit = torch.nn.functional.normalize(normal(n, d), dim=1)
    cosine = unit @ unit.T
    cosine.fill_diagonal_(-1)
    mean = (cosines * nearest).sum() / nearest.sum()
    assert mean == pytest.approx(cosine.amax(1).mean().item(), abs=0.015)


def test_cosine_counts_in_blocks_equal_the_obvious_ones():
    unit = torch.nn.functional.normalize(normal(11, 4), dim=1).numpy()
    edges = np.linspace(-1, 1, 21)
    cosine = unit @ unit.T
    other = ~np.eye(11, dtype=bool)
    pairs = np.histogram(cosine[other], edges)[0]
    nearest = np.histogram(np.where(other, cosine, -1).max(1), edges)[0]
    for block in (1, 4, 100):
        got = maps._cosine_counts(unit, edges, block)
        assert np.array_equal(got[0], pairs) and np.array_equal(got[1], nearest)


def test_cosine_map_is_sorted_by_group_and_leaves_out_zero_rows():
    rows = torch.tensor([[1.0, 0], [0, 2], [0, 0], [-3, 0]])
    panels = {"latent": (rows, [1, 0, 0, 1]), "image": (normal(5, 3), [0] * 5)}
    fig = plots.cosine_map(panels, title="t")
    # Order: row 1 (group 0), then rows 0 and 3 (group 1).
    assert fig.data[0].z.tolist() == [[100, 0, 0], [0, 100, -100], [0, -100, 100]]
    assert fig.layout.xaxis.ticktext == ("0", "1")
    assert fig.layout.xaxis.tickvals.tolist() == [0, 1.5]
    titles = [a.title.text for a in (fig.layout.xaxis, fig.layout.yaxis2)]
    assert titles == ["latent", "image"]


def test_cosine_map_of_many_rows_keeps_the_proportions_of_the_groups():
    groups = torch.tensor([0] * 600 + [1] * 300 + [2] * 100).flip(0)
    fig = plots.cosine_map({"row": (normal(1000, 4), groups)}, title="t", n=100)
    assert fig.data[0].z.shape == (100, 100)
    edges = sorted({shape.x0 for shape in fig.layout.shapes if shape.x0 == shape.x1})
    assert edges == pytest.approx([59.5, 89.5], abs=1)


def test_pca_map_gives_every_class_its_points_and_shows_the_shares():
    """A class has one colour and one legend entry in both panels."""
    points = normal(6, 2)
    panels = {
        "a decoder row": (points, [0.25, 0.125], [4, 4, 2, -1, 2, 4]),
        "a code": (normal(2, 2), [0.5, 0.5], [4, 9]),
    }
    fig = plots.pca_map(panels, title="t")
    assert [t.name for t in fig.data] == ["2", "4", "none", "4", "9"]
    assert [t.showlegend for t in fig.data] == [True, True, True, False, True]
    assert np.array_equal(fig.data[1].x, points[[0, 1, 5], 0])
    assert fig.data[1].marker.color == fig.data[3].marker.color
    assert "25.0 %" in fig.layout.xaxis.title.text
    assert "12.5 %" in fig.layout.yaxis.title.text


def test_ladder_puts_every_run_on_the_line_of_its_name_in_every_panel():
    fig = plots.ladder(
        RUNS, ["dead %", "FVU"], group="lr", title="t", nulls={"FVU": 1.0}
    )
    assert [t.name for t in fig.data] == ["0.1", "0.2"] * 2  # a panel after the other
    assert [t.showlegend for t in fig.data] == [True, True, False, False]
    assert fig.data[0].x.tolist() == [80, 1, 90]
    assert fig.data[3].x.tolist() == [0.4]
    line = dict(zip(fig.layout.yaxis.ticktext, fig.layout.yaxis.tickvals, strict=True))
    assert line["naive"] > line["tied"]  # from top to bottom
    for trace in fig.data:
        for name, y in zip(trace.customdata, trace.y, strict=True):
            assert abs(y - line[name]) < 0.3
    assert fig.data[0].y[0] > fig.data[1].y[0]  # groups apart, in order
    (null,) = fig.layout.shapes
    assert (null.x0, null.xref) == (1.0, "x2")
    low, high = fig.layout.xaxis.range
    assert low < 0 and high > 90
