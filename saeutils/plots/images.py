"""Figures of images, and of activation vectors that are not images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from saeutils.plots.style import LINES, array, colour_bar, name_rows, styled

GAP = 3  # image pixels between two columns
Box = tuple[int, int, int, int]  # top, left, height, width, in pixels of the image


def image_grid(
    images: Any,
    *,
    captions: Sequence[Sequence[str]] = (),
    row_titles: Sequence[str] = (),
    boxes: Sequence[Sequence[Box | None]] = (),
    title: str,
    subtitle: str = "",
    cell: int = 64,
) -> go.Figure:
    """Grey images (rows, columns, h, w), dark ink on white, as ONE heat map.

    Args:
        captions: text under each image; two lines with <br>.
        row_titles: text at the left of each row.
        boxes: what to frame in each image, such as the patch of a row.
        cell: pixels of an image on the screen.
    """
    images = array(images)
    n_rows, n_columns, h, w = images.shape
    zoom = cell / h
    below = _lines(text for row in captions for text in row) * 13 + 6
    pitch = h + round(below / zoom), w + GAP  # of the grid, in image pixels
    canvas = np.zeros((n_rows, pitch[0], n_columns, pitch[1]), images.dtype)
    canvas[:, :h, :, :w] = images.transpose(0, 2, 1, 3)
    canvas = canvas.reshape(n_rows * pitch[0], n_columns * pitch[1])
    fig = go.Figure(
        go.Heatmap(
            z=canvas,
            zmin=0,
            zmax=255 if canvas.dtype == np.uint8 else float(max(canvas.max(), 1e-9)),
            colorscale=[[0, "white"], [1, "black"]],
            showscale=False,
            hoverinfo="skip",
        )
    )
    for i, row in enumerate(captions):
        for j, text in enumerate(row):
            fig.add_annotation(
                x=j * pitch[1] + (w - 1) / 2,
                y=i * pitch[0] + h - 0.5,
                text=text,
                showarrow=False,
                yanchor="top",
                font_size=10,
            )
    for i, row in enumerate(boxes):
        for j, box in enumerate(row):
            if box is not None:
                top, left = i * pitch[0] + box[0] - 0.5, j * pitch[1] + box[1] - 0.5
                fig.add_shape(
                    type="rect",
                    x0=left,
                    x1=left + box[3],
                    y0=top,
                    y1=top + box[2],
                    line=dict(color=LINES[1], width=2),
                )
    room = name_rows(fig, row_titles, pitch[0], h)
    margin = dict(l=room, r=20, t=85 if subtitle else 55, b=10)
    height, width = (round(n * zoom) for n in canvas.shape)
    styled(
        fig,
        title,
        subtitle,
        width=max(width, 400) + margin["l"] + margin["r"],
        height=height + margin["t"] + margin["b"],
    )
    right = canvas.shape[1] * max(width, 400) / width
    fig.update_xaxes(visible=False, range=[-0.5, right - 0.5])
    fig.update_yaxes(visible=False, range=[canvas.shape[0] - 0.5, -0.5])
    # The title starts where the row titles do.
    title_at = dict(xref="container", x=0, xanchor="left", pad_l=20)
    return fig.update_layout(margin=margin, title=title_at)


def _lines(texts: Any) -> int:
    """Lines of the tallest text; 0 when there is none."""
    return max((t.count("<br>") + 1 for t in texts if t), default=0)


def top_images(
    examples: Sequence[Any],
    data: Any,
    *,
    n: int = 10,
    row_titles: Sequence[str] = (),
    boxes: Sequence[Sequence[Box | None]] = (),
    title: str = "Images that a latent responds to most",
    subtitle: str = "Under each image: label · activation, and the image's id",
) -> go.Figure:
    """A row of images for each latent; fewer where fewer images make it fire.

    Args:
        examples: of each latent `latent`, `values`, `ids`, `labels`
            (`examples.Examples`).
        data: the images (m, h, w) as `data.images`, and their ids (m,) as `data.ids`
            (`datasets.ImageData`); examples and images are joined by id.
        boxes: what to frame in each image, for each example (`store.context(...).box`).

    Raises:
        ValueError: an example whose id is not among the data's.
    """
    images, ids = array(data.images), array(data.ids)
    position = {int(item): i for i, item in enumerate(ids)}
    grid = np.zeros((len(examples), n, *images.shape[1:]), images.dtype)
    captions = []
    for i, e in enumerate(examples):
        wanted = array(e.ids)[:n].tolist()
        if missing := [item for item in wanted if item not in position]:
            raise ValueError(
                f"image {missing[0]} is not among the {len(ids)} images given: pass "
                "those that the codes were computed from"
            )
        grid[i, : len(wanted)] = images[[position[item] for item in wanted]]
        numbers = [f"{value:.3g}" for value in array(e.values)[:n]]
        if e.labels is not None:
            labels = array(e.labels)[:n]
            numbers = [f"{c} · {v}" for c, v in zip(labels, numbers, strict=True)]
        pairs = zip(numbers, wanted, strict=True)
        captions.append([f"{text}<br>#{item}" for text, item in pairs])
    titles = row_titles or [f"latent {e.latent}" for e in examples]
    return image_grid(
        grid,
        captions=captions,
        row_titles=titles,
        boxes=boxes,
        title=title,
        subtitle=subtitle,
        cell=56,
    )


def reconstructions(
    original: Any,
    reconstructed: Any,
    names: Sequence[str],
    before: Any,
    after: Any,
    *,
    title: str,
    subtitle: str = "Upper strip: the activations; lower strip: their reconstruction",
    x: str = "neuron",
) -> go.Figure:
    """Activation vectors as strips, each above its reconstruction, on one scale.

    Args:
        original, reconstructed: (n, d), at most a dozen rows.
        names: text at the left of each pair, e.g. the label and the id.
        before, after: (n, classes) probabilities that the model gives, with the
            activations and with their reconstruction; said at the right.
    """
    original, reconstructed = array(original), array(reconstructed)
    n, d = original.shape
    strips = np.full((n, 3, d), np.nan, np.float32)
    strips[:, 0], strips[:, 1] = original, reconstructed
    limit = float(np.quantile(np.abs(strips[:, :2]), 0.995))
    signed = original.min() < 0
    fig = go.Figure(
        go.Heatmap(
            z=strips.reshape(3 * n, d)[:-1],
            zmin=-limit if signed else 0,
            zmax=limit,
            colorscale="RdBu_r" if signed else "Blues",
            colorbar=colour_bar(
                "activation", len=0.7, xref="container", x=0.995, xanchor="right"
            ),
            hovertemplate=f"{x} %{{x}}: %{{z:.2f}}<extra></extra>",
        )
    )
    says = [
        f"says {p.argmax()} ({p.max():.1%})<br>then {q.argmax()} ({q.max():.1%})"
        for p, q in zip(array(before), array(after), strict=True)
    ]
    for side, texts in ((0, names), (1, says)):
        for i, text in enumerate(texts):
            fig.add_annotation(
                x=side,
                xref="paper",
                xshift=8 * (2 * side - 1),
                y=3 * i + 0.5,
                text=text,
                showarrow=False,
                xanchor="left" if side else "right",
                align="left" if side else "right",
                font_size=11,
            )
    fig.update_yaxes(visible=False, autorange="reversed")
    fig.update_xaxes(showgrid=False)
    styled(fig, title, subtitle, x=x, width=820, height=150 + 44 * n)
    return fig.update_layout(margin=dict(l=90, r=190))
