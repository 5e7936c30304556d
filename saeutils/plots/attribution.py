"""Figures of attributions: over the images, as curves, and one against another."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saeutils.plots.images import GAP
from saeutils.plots.style import (
    LINES,
    NULL,
    array,
    colour_bar,
    name_rows,
    panel_titles,
    styled,
)

DASHES = ("dash", "dot", "dashdot")


def attributions(
    images: Any,
    maps: Mapping[str, Any],
    *,
    row_titles: Sequence[str] = (),
    title: str,
    subtitle: str = "Red: more ink there excites the unit; blue: it inhibits",
    cell: int = 84,
) -> go.Figure:
    """A row an image: first the image, then it in grey under each attribution.

    Each attribution has its own scale: full colour is the 99.5th percentile of its
    absolute values.

    Args:
        images: (n, h, w), uint8 or in [0, 1].
        maps: name -> (n, h·w) attributions, signed or not.
        cell: pixels of an image on the screen.
    """
    images = array(images).astype(np.float32)
    images = images / 255 if images.max() > 1 else images
    n, h, w = images.shape
    pitch = h + GAP, w + GAP
    shape = n, pitch[0], 1 + len(maps), pitch[1]
    # Whole percents of full colour: a byte a pixel.
    below, above = np.zeros(shape, np.int8), np.zeros(shape, np.int8)
    below[:, :h, 0, :w] = 100 * images
    below[:, :h, 1:, :w] = 22 * images[:, :, None]
    for j, values in enumerate(maps.values(), start=1):
        values = array(values).reshape(n, h, w)
        full = np.quantile(np.abs(values), 0.995, axis=(1, 2), keepdims=True)
        largest = np.abs(values).max((1, 2), keepdims=True)
        full = np.where(full > 0, full, np.maximum(largest, 1e-30))
        share = np.clip(values / full, -1, 1)
        above[:, :h, j, :w] = 100 * share
    fig = go.Figure()
    red, blue = "rgba(190,20,40,{})", "rgba(15,85,180,{})"
    stops = [(0, blue, 1), (0.25, blue, 0.6), (0.5, blue, 0), (0.5, red, 0)]
    stops += [(0.75, red, 0.6), (1, red, 1)]
    for canvas, low, scale in (
        (below, 0, [[0, "white"], [1, "black"]]),
        (above, -100, [[at, colour.format(alpha)] for at, colour, alpha in stops]),
    ):
        canvas = canvas.reshape(n * pitch[0], (1 + len(maps)) * pitch[1])
        fig.add_heatmap(
            z=canvas,
            zmin=low,
            zmax=100,
            colorscale=scale,
            showscale=False,
            hoverinfo="skip",
        )
    for j, text in enumerate(["image", *maps]):
        fig.add_annotation(
            x=j * pitch[1] + (w - 1) / 2,
            y=1,
            yref="paper",
            yshift=2,
            text=text,
            showarrow=False,
            yanchor="bottom",
            font_size=11,
        )
    room = name_rows(fig, row_titles, pitch[0], h)
    margin = dict(l=room, r=20, t=135 if subtitle else 100, b=10)
    height, width = n * pitch[0] * cell / h, (1 + len(maps)) * pitch[1] * cell / w
    size = dict(
        width=round(width) + margin["l"] + margin["r"],
        height=round(height) + margin["t"] + margin["b"],
    )
    styled(fig, title, subtitle, **size)
    fig.update_xaxes(visible=False, range=[-0.5, (1 + len(maps)) * pitch[1] - 0.5])
    fig.update_yaxes(visible=False, range=[n * pitch[0] - 0.5, -0.5])
    title_at = dict(xref="container", x=0, xanchor="left", pad_l=20)
    return fig.update_layout(margin=margin, title=title_at)


def removal_curves(
    panels: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
    subtitle: str = "0: as on a blank image; 1: as on the whole image",
    controls: Sequence[str] = (),
    across: int = 2,
) -> go.Figure:
    """Deletion and insertion curves, one panel each, controls in grey.

    Args:
        panels: panel title -> name -> curve at equal steps from 0 % to 100 % of the
            pixels.
        across: panels beside each other.
    """
    down = -(-len(panels) // across)
    fig = make_subplots(
        down,
        across,
        subplot_titles=list(panels),
        horizontal_spacing=0.08,
        vertical_spacing=0.25 / down,
    )
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    coloured = [name for name in names if name not in controls]
    shown = set()
    for i, curves in enumerate(panels.values()):
        for name, heights in curves.items():
            heights, null = array(heights), name in controls
            number = (list(controls) if null else coloured).index(name)
            fig.add_scatter(
                x=np.linspace(0, 100, len(heights)),
                y=heights,
                name=name,
                legendgroup=name,
                showlegend=name not in shown,
                mode="lines",
                line=dict(
                    color=NULL if null else LINES[number % len(LINES)],
                    width=2,
                    dash=DASHES[number % 3] if null else "solid",
                ),
                row=i // across + 1,
                col=i % across + 1,
            )
            shown.add(name)
    styled(fig, title, subtitle, width=980, height=150 + 290 * down)
    fig.update_xaxes(ticksuffix=" %")
    fig.update_xaxes(title_text="pixels moved, in % of the image", row=down)
    fig.update_yaxes(title_text="pre-activation, as a share", col=1)
    return panel_titles(fig)


def agreement(
    frames: Mapping[str, Any],
    *,
    title: str,
    subtitle: str = "Mean Spearman's ρ of magnitudes, over pixels with ink",
) -> go.Figure:
    """Square tables of correlations, one panel each, with the numbers written in."""
    fig = make_subplots(
        1, len(frames), subplot_titles=list(frames), horizontal_spacing=0.24
    )
    for j, frame in enumerate(frames.values(), start=1):
        z = array(frame)
        fig.add_heatmap(
            z=z,
            x=list(frame.columns),
            y=list(frame.index),
            zmin=-1,
            zmax=1,
            colorscale="RdBu_r",
            text=[[f"{v:.2f}" for v in row] for row in z],
            texttemplate="%{text}",
            textfont_size=11,
            xgap=1,
            ygap=1,
            colorbar=colour_bar("ρ"),
            showscale=j == len(frames),
            row=1,
            col=j,
        )
    fig.update_yaxes(autorange="reversed", showgrid=False, ticksuffix=" ")
    fig.update_xaxes(tickangle=-45, showgrid=False)
    largest = max(len(frame) for frame in frames.values())
    width = 230 + len(frames) * (150 + 40 * largest)
    styled(fig, title, subtitle, width=width, height=300 + 34 * largest)
    return panel_titles(fig).update_layout(margin=dict(l=160, b=130))
