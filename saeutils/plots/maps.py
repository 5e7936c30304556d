"""Figures of directions: principal components and cosines, each with its null."""

from collections.abc import Mapping
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
    styled,
)


def pca_map(
    panels: Mapping[str, tuple[Any, Any, Any]], *, title: str, subtitle: str = ""
) -> go.Figure:
    """Two principal components, coloured by class; one panel for each kind of point.

    Args:
        panels: what a point IS ("a decoder row: one point a latent") -> (points
            (n, 2), share of the total variance of these two components (2,), class of
            each point (n,), negative = none, grey).
    """
    classes = {name: array(panel[2]) for name, panel in panels.items()}
    every = np.unique(np.concatenate(list(classes.values())))
    order = [*every[every >= 0], *every[every < 0]]
    fig = make_subplots(
        1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.12
    )
    shown = set()
    for column, (what, (points, shares, _)) in enumerate(panels.items(), start=1):
        points = array(points)
        for i, c in enumerate(order):
            where = classes[what] == c
            if not where.any():
                continue
            name = str(c) if c >= 0 else "none"
            fig.add_scatter(
                x=points[where, 0],
                y=points[where, 1],
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=name not in shown,
                marker=dict(
                    size=5,
                    color=CLASSES[i % len(CLASSES)] if c >= 0 else NULL,
                    opacity=0.65,
                ),
                hoverinfo="name",
                row=1,
                col=column,
            )
            shown.add(name)
        for update, i in ((fig.update_xaxes, 0), (fig.update_yaxes, 1)):
            share = 100 * float(array(shares)[i])
            text = f"component {i + 1}: {share:.1f} % of variance"
            update(title_text=text, row=1, col=column)
    styled(fig, title, subtitle, width=60 + 420 * len(panels), height=540)
    fig.update_xaxes(zeroline=False)
    fig.update_yaxes(zeroline=False)
    fig.update_layout(legend_title_text="class", showlegend=True)
    return panel_titles(legend_below(fig))


def cosine_map(
    panels: Mapping[str, tuple[Any, Any]],
    *,
    title: str,
    subtitle: str = "",
    n: int = 300,
) -> go.Figure:
    """Cosines between rows, sorted by group, −1 blue to 1 red.

    Zero rows have no direction and are left out. Of more than n rows, n are drawn,
    evenly spaced in the sorted order, so that groups keep their proportions.

    Args:
        panels: what a row IS, for its axes ("latent (decoder row), by its top class")
            -> (rows (n, d), group of each row (n,)).
    """
    fig = make_subplots(1, len(panels), horizontal_spacing=0.12)
    for column, (what, (rows, groups)) in enumerate(panels.items(), start=1):
        rows, groups = array(rows), array(groups)
        alive = np.linalg.norm(rows, axis=1) > 0
        order = np.argsort(groups[alive], kind="stable")
        if len(order) > n:
            order = order[np.linspace(0, len(order) - 1, n).astype(int)]
        groups, unit = groups[alive][order], _unit(rows[alive][order])
        # A byte a cell, not eight characters.
        percent = np.rint(100 * unit @ unit.T).clip(-100, 100).astype(np.int8)
        hover = "cosine %{z} / 100<extra></extra>"
        heat = go.Heatmap(z=percent, coloraxis="coloraxis", hovertemplate=hover)
        fig.add_trace(heat, row=1, col=column)
        values, start, size = np.unique(groups, return_index=True, return_counts=True)
        for edge in start[1:] - 0.5:
            options = dict(line=dict(color=NULL, width=0.5), row=1, col=column)
            fig.add_vline(edge, **options).add_hline(edge, **options)
        ends = [-0.5, len(unit) - 0.5]
        axis = dict(
            title_text=what,
            tickvals=start + size / 2 - 0.5,
            ticktext=[str(v) for v in values],
            showgrid=False,
            zeroline=False,
        )
        fig.update_xaxes(axis, range=ends, row=1, col=column)
        fig.update_yaxes(axis, range=ends[::-1], ticksuffix=" ", row=1, col=column)
    ticks = dict(
        tickvals=[-100, -50, 0, 50, 100], ticktext=["−1", "−0.5", "0", "0.5", "1"]
    )
    scale = dict(
        cmin=-100, cmax=100, colorscale="RdBu_r", colorbar=colour_bar("cosine", **ticks)
    )
    styled(fig, title, subtitle, width=120 + 400 * len(panels), height=500)
    return fig.update_layout(coloraxis=scale)


def cosine_histogram(
    groups: Mapping[str, Any],
    *,
    title: str = "Angles between decoder rows",
    subtitle: str = "",
    bins: int = 100,
) -> go.Figure:
    """Cosines of all pairs of rows, and of each row with its nearest other row.

    Each panel carries its null, the density for random directions in d dimensions,
    p(c) ∝ (1 − c²)^((d − 3) / 2); for the nearest of n − 1 of them, taken as
    independent, (n − 1) P(c)^(n − 2) p(c) with P the integral of p.

    Args:
        groups: of each name its rows (n, d), d the same for all; zero rows are left
            out. The null of the nearest row is drawn for the largest n.
    """
    units = {name: _unit(array(rows)) for name, rows in groups.items()}
    d = next(iter(units.values())).shape[1]
    n = max(len(unit) for unit in units.values())
    edges = np.linspace(-1, 1, bins + 1)
    panels = ("all pairs", "each row and the row nearest to it")
    fig = make_subplots(1, 2, subplot_titles=panels)
    for i, (name, unit) in enumerate(units.items()):
        for column, counts in enumerate(_cosine_counts(unit, edges), start=1):
            fig.add_scatter(
                x=np.append(edges, 1.0),
                y=np.concatenate([[0], counts / counts.sum() * bins / 2, [0]]),
                line=dict(color=LINES[i % len(LINES)], width=2, shape="vh"),
                mode="lines",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                row=1,
                col=column,
            )
    cosines, *nulls = null_cosines(d, n)
    for column, null in enumerate(nulls, start=1):
        fig.add_scatter(
            x=cosines,
            y=null,
            mode="lines",
            line=dict(color=NULL, width=2, dash="dash"),
            name=f"null: random directions in {d} dimensions",
            legendgroup="null",
            showlegend=column == 1,
            row=1,
            col=column,
        )
    styled(fig, title, subtitle, x="cosine", width=900, height=470)
    fig.update_xaxes(range=[-1, 1])
    fig.update_yaxes(title_text="density", col=1)
    return panel_titles(legend_below(fig))


def _cosine_counts(
    unit: np.ndarray, edges: np.ndarray, block: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """Histograms of the cosines of all pairs, and of each row's nearest; in blocks."""
    pairs, nearest = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    for start in range(0, len(unit), block):
        cosine = (unit[start : start + block] @ unit.T).clip(-1, 1)
        own = np.arange(len(cosine))
        cosine[own, start + own] = np.nan
        pairs += np.histogram(cosine[~np.isnan(cosine)], edges)[0]
        nearest += np.histogram(np.nanmax(cosine, 1), edges)[0]
    return pairs, nearest


def null_cosines(
    d: int, n: int, points: int = 401
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cosines, density for any pair, density for the nearest of n − 1) by chance."""
    fine = np.linspace(-1, 1, 20 * (points - 1) + 1)
    log_p = (d - 3) / 2 * np.log1p(-np.minimum(fine**2, 1 - 1e-12))
    p = np.exp(log_p)
    step = fine[1] - fine[0]
    p /= p.sum() * step
    below = np.clip(np.cumsum(p) * step, 0, 1)
    nearest = (n - 1) * below ** (n - 2) * p
    return fine[::20], p[::20], nearest[::20]


def _unit(rows: np.ndarray) -> np.ndarray:
    """The rows at length 1, without those of length 0."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    alive = norm[:, 0] > 0
    return rows[alive] / norm[alive]
