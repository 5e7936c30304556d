"""Groups of images side by side, a heading above each group."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from saeutils.plots.images import GAP, image_grid
from saeutils.plots.style import array

SPACE = 12  # image pixels between two groups, beside the usual gap


def image_panels(
    groups: Mapping[str, tuple[Any, Sequence[Sequence[str]]]],
    *,
    row_titles: Sequence[str] = (),
    title: str,
    subtitle: str = "",
    cell: int = 56,
) -> go.Figure:
    """Grey images in groups of columns, each group under its heading.

    Args:
        groups: heading (two lines with <br>) -> (images (rows, columns, h, w), text
            under each image, or () for none; a row may have fewer texts than images).
            The number of rows is the same in all groups.

    Raises:
        ValueError: groups of different numbers of rows.
    """
    parts = {name: array(images) for name, (images, _) in groups.items()}
    if len({len(part) for part in parts.values()}) != 1:
        counts = {name: len(part) for name, part in parts.items()}
        raise ValueError(f"groups must have the same number of rows, got {counts}")
    columns = [part.shape[1] for part in parts.values()]
    n_rows = len(next(iter(parts.values())))
    captions = []
    if any(len(texts) for _, texts in groups.values()):
        for row in range(n_rows):
            captions.append([])
            for (_, texts), n in zip(groups.values(), columns, strict=True):
                own = list(texts[row]) if len(texts) else []
                captions[-1] += own + [""] * (n - len(own))
    fig = image_grid(
        np.concatenate(list(parts.values()), axis=1),
        captions=captions,
        row_titles=row_titles,
        title=title,
        subtitle=subtitle,
        cell=cell,
    )
    h, w = next(iter(parts.values())).shape[2:]
    starts = np.cumsum([0, *columns[:-1]])
    # Everything right of the first group moves right: the heat map gets its own x.
    heat = fig.data[0]
    pitch = w + GAP
    x = np.arange(array(heat.z).shape[1], dtype=float)
    group = np.searchsorted(starts, x // pitch, side="right") - 1
    canvas = np.zeros((len(heat.z), len(x) + SPACE * (len(parts) - 1)), heat.z.dtype)
    canvas[:, (x + SPACE * group).astype(int)] = heat.z
    heat.z = canvas
    for note in fig.layout.annotations:
        if note.xref != "paper":
            note.x += SPACE * (np.searchsorted(starts, note.x // pitch, "right") - 1)
    for i, (name, start) in enumerate(zip(parts, starts, strict=True)):
        fig.add_annotation(
            x=start * pitch + i * SPACE - 0.5,
            y=1,
            yref="paper",
            yshift=6,
            text=f"<b>{name}</b>",
            showarrow=False,
            xanchor="left",
            yanchor="bottom",
            align="left",
            font_size=11,
        )
    lines = max(name.count("<br>") + 1 for name in parts)
    left, right = fig.layout.margin.l, fig.layout.margin.r
    width = round(canvas.shape[1] * cell / h)
    shown = max(width, 400)
    fig.update_xaxes(range=[-0.5, canvas.shape[1] * shown / width - 0.5])
    return fig.update_layout(
        width=shown + left + right,
        height=fig.layout.height + 17 * lines + 10,
        margin_t=fig.layout.margin.t + 17 * lines + 10,
    )
