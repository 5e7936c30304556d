"""Figures of probes and of maps of representations."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saeutils.plots.style import (
    CLASSES,
    LINES,
    NULL,
    array,
    colour_bar,
    legend_below,
    panel_titles,
    spread,
    styled,
)


def sparse_probes(
    frame: Any,
    *,
    title: str,
    subtitle: str = "Mean over classes; bars span the runs",
    controls: Sequence[str] = (),
) -> go.Figure:
    """Score over the number of latents, one line a "name"; controls are dashed grey.

    Args:
        frame: a row a run and k, with name, k and score.
    """
    fig = go.Figure()
    for i, (name, part) in enumerate(frame.groupby("name", sort=False)):
        runs = part.groupby("k")["score"]
        mean, null = runs.mean(), name in controls
        fig.add_scatter(
            x=list(mean.index),
            y=array(mean),
            error_y=spread(runs),
            name=str(name),
            mode="lines+markers",
            line=dict(
                color=NULL if null else LINES[i % len(LINES)],
                dash="dash" if null else "solid",
                width=2,
            ),
            marker_size=7,
        )
    fig.add_hline(
        y=0.5,
        line=dict(color=NULL, width=1.5, dash="dot"),
        annotation=dict(text="chance", font_color=NULL),
    )
    ks = sorted(set(frame["k"]))
    fig.update_xaxes(type="log", tickvals=ks, ticktext=[str(k) for k in ks])
    styled(fig, title, subtitle, y="balanced accuracy on test images", height=460)
    return fig.update_xaxes(title_text="latents that the probe may read")


def by_class(
    values: Any,
    names: Sequence[str],
    classes: Any,
    *,
    title: str,
    subtitle: str = "",
    bar: str,
    limits: tuple[float, float] | None = None,
) -> go.Figure:
    """Heat map of a score (names, classes), with the numbers written in."""
    z = array(values)
    low, high = limits or (float(np.nanmin(z)), float(np.nanmax(z)))
    fig = go.Figure(
        go.Heatmap(
            z=z,
            x=[str(c) for c in array(classes)],
            y=list(names),
            zmin=low,
            zmax=high,
            colorscale="Blues_r",
            xgap=1,
            ygap=1,
            text=[[f"{v:.2f}" for v in row] for row in z],
            texttemplate="%{text}",
            colorbar=colour_bar(bar),
        )
    )
    fig.update_xaxes(type="category", showgrid=False)
    fig.update_yaxes(
        autorange="reversed", automargin=True, showgrid=False, ticksuffix="  "
    )
    height = 180 + 32 * len(z)
    return styled(fig, title, subtitle, x="class", width=760, height=height)


def point_maps(
    panels: Mapping[str, tuple[Any, Any]], *, title: str, subtitle: str = ""
) -> go.Figure:
    """Points of a map whose axes mean nothing (UMAP), coloured by class.

    Args:
        panels: what was mapped -> (points (n, 2), class of each point (n,)).
    """
    fig = make_subplots(
        1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.04
    )
    shown = set()
    every = np.unique(np.concatenate([array(c) for _, c in panels.values()]))
    for column, (points, classes) in enumerate(panels.values(), start=1):
        points, classes = array(points), array(classes)
        for i, c in enumerate(every):
            where = classes == c
            fig.add_scatter(
                x=points[where, 0],
                y=points[where, 1],
                mode="markers",
                name=str(c),
                legendgroup=str(c),
                showlegend=c not in shown,
                marker=dict(size=4, color=CLASSES[i % len(CLASSES)], opacity=0.7),
                hoverinfo="name",
                row=1,
                col=column,
            )
            shown.add(c)
    styled(fig, title, subtitle, width=60 + 310 * len(panels), height=500)
    fig.update_xaxes(showticklabels=False, zeroline=False, showgrid=False)
    fig.update_yaxes(showticklabels=False, zeroline=False, showgrid=False)
    fig.update_xaxes(title_text="UMAP 1")
    fig.update_yaxes(title_text="UMAP 2", col=1)
    fig.update_layout(legend_title_text="class")
    return panel_titles(legend_below(fig))
