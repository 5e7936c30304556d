"""Figures of text and of language models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saeutils.plots.style import (
    LINES,
    NULL,
    array,
    colour_bar,
    legend_below,
    panel_titles,
    styled,
)
from saeutils.plots.text import Page, escaped


def highlighted(
    texts: Mapping[str, tuple[Sequence[str], Any]],
    *,
    title: str,
    subtitle: str = "",
    unit: str,
    high: int | float | None = None,
    columns: int = 92,
) -> go.Figure:
    """Texts with every token on a ground as strong as its value, 0 (white) to `high`.

    Args:
        texts: heading -> (tokens as text, a value a token; NaN: no colour).
        unit: what the values are, for the colour bar.
        high: the value of full colour; default: the 99th percentile.
        columns: characters a line.
    """
    every = np.concatenate([array(values).ravel() for _, values in texts.values()])
    high = high or float(np.nanpercentile(every, 99)) or 1.0
    page, y = Page(), 0.0
    for heading, (tokens, values) in texts.items():
        page.note(0, y, f"<b>{heading}</b>", "left")
        y, x = y + 1, 0
        for token, value in zip(tokens, array(values), strict=True):
            text = token.replace("\n", "⏎")
            if x + len(text) > columns:
                y, x = y + 1, 0
            hover = f"{escaped(text)}: {value:.2f} {unit}"
            page.word(x, y, text, float(value) / high, hover)
            x += len(text)
            if "\n" in token:
                y, x = y + 1, 0
        y += 1.6
    sizes = dict(columns=columns, lines=y, above=120)
    return page.figure(title, subtitle, **sizes, unit=unit, high=high)


def curves(
    lines: Mapping[str, tuple[Any, Any]],
    *,
    x: str,
    y: str,
    title: str,
    subtitle: str = "",
    levels: Mapping[str, float] | None = None,
    markers: bool = False,
) -> go.Figure:
    """One line a name; `levels` are dotted grey lines across, with their names."""
    fig = go.Figure()
    for i, (name, (at, values)) in enumerate(lines.items()):
        fig.add_scatter(
            x=array(at),
            y=array(values),
            name=name,
            mode="lines+markers" if markers else "lines",
            line=dict(color=LINES[i % len(LINES)], width=2),
        )
    for name, value in (levels or {}).items():
        fig.add_hline(
            y=value,
            line=dict(color=NULL, dash="dot"),
            annotation=dict(text=name, font_color=NULL),
            annotation_position="top right",
        )
    return legend_below(styled(fig, title, subtitle, x=x, y=y))


def effects(
    frame: Any,
    columns: Mapping[str, str],
    *,
    x: str,
    title: str,
    subtitle: str = "",
    levels: Mapping[str, float] | None = None,
) -> go.Figure:
    """One line a "name", one dot a column: the same quantity under several treatments.

    Args:
        columns: column of the frame -> its name in the legend; "null" is drawn grey.
        levels: name -> a value to mark across, dotted.
    """
    names = list(frame["name"])
    fig = go.Figure()
    for i, (column, label) in enumerate(columns.items()):
        fig.add_scatter(
            x=array(frame[column]),
            y=names,
            name=label,
            mode="markers",
            marker=dict(
                color=NULL if column == "null" else LINES[i % len(LINES)],
                size=11,
                symbol=("circle", "diamond", "square", "cross")[i % 4],
                line=dict(color="white", width=1),
            ),
            cliponaxis=False,  # a dot at 0 is a whole dot
        )
    for name, value in (levels or {}).items():
        fig.add_vline(
            x=value,
            line=dict(color=NULL, dash="dot"),
            annotation=dict(text=name, font_color=NULL),
            annotation_position="top",
        )
    fig.update_xaxes(rangemode="tozero")
    fig.update_yaxes(
        categoryorder="array",
        categoryarray=names[::-1],
        automargin=True,
        ticksuffix="  ",
    )
    height = 225 + 28 * len(names)
    fig = legend_below(styled(fig, title, subtitle, x=x, height=height))
    return fig.update_layout(margin_t=110 if levels and subtitle else 90)


def attention_patterns(
    patterns: Mapping[str, Any],
    *,
    title: str,
    subtitle: str = "Mean over texts; the colour is the square root of the share",
    positions: int = 96,
) -> go.Figure:
    """Where heads look: one row of panels a layer, one panel a head.

    Args:
        patterns: name of the layer -> (heads, query, key), each row sums to 1.
        positions: how many of the first positions are drawn.
    """
    every = {name: array(p)[:, :positions, :positions] for name, p in patterns.items()}
    across = max(len(p) for p in every.values())
    titles = [
        f"{name}, head {h}" if h < len(p) else ""
        for name, p in every.items()
        for h in range(across)
    ]
    fig = make_subplots(
        len(every),
        across,
        subplot_titles=titles,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.012,
        vertical_spacing=0.16 / len(every),
        x_title="position looked at",
        y_title="position that looks",
    )
    for row, pattern in enumerate(every.values(), start=1):
        for column, head in enumerate(pattern, start=1):
            fig.add_heatmap(z=np.sqrt(head), coloraxis="coloraxis", row=row, col=column)
    fig.update_yaxes(autorange="reversed", showticklabels=False)
    fig.update_xaxes(showticklabels=False)
    side = 820 // across
    height = 150 + (side + 30) * len(every)
    fig = panel_titles(styled(fig, title, subtitle, width=940, height=height), size=11)
    return fig.update_layout(
        coloraxis=dict(colorscale="Blues", colorbar=colour_bar("√ share"))
    )
