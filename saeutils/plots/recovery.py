"""What of a known truth was found: by rate, over settings, against reconstruction."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from saeutils.plots.style import LINES, NULL, array, colour_bar, legend_below, styled

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "x")


def recovery_by_rate(
    groups: Mapping[str, tuple[Any, Any]],
    *,
    title: str,
    subtitle: str = "",
    y: str = "share of features found (cosine > 0.9)",
    bins: int = 8,
    controls: Sequence[str] = (),
) -> go.Figure:
    """Mean of a score over features of like rate: one line a method.

    Args:
        groups: name -> (rates (n,), score of each (n,)); bins hold equally many.
        controls: names drawn grey and dotted.
    """
    fig = go.Figure()
    for i, (name, (rates, score)) in enumerate(groups.items()):
        rates, score = array(rates), array(score).astype(float)
        order = np.argsort(rates, kind="stable")
        parts = np.array_split(order, bins)
        control = name in controls
        fig.add_scatter(
            x=[rates[p].mean() for p in parts],
            y=[score[p].mean() for p in parts],
            mode="lines+markers",
            name=name,
            line=dict(
                color=NULL if control else LINES[i % len(LINES)],
                dash="dot" if control else "solid",
            ),
            marker=dict(symbol=SYMBOLS[i % len(SYMBOLS)], size=8),
            hovertemplate="rate %{x:.4f}: %{y:.3f}",
        )
    fig.update_xaxes(type="log")
    fig.update_yaxes(range=[-0.03, 1.04])
    styled(fig, title, subtitle, x="rate: share of rows on which a feature fires", y=y)
    return legend_below(fig)


def phase_diagram(
    values: Any,
    across: Sequence[Any],
    down: Sequence[Any],
    *,
    title: str,
    subtitle: str = "",
    x: str,
    y: str,
    bar: str = "found",
) -> go.Figure:
    """Heat map of `values` (down, across) in [0, 1], numbers written in the cells."""
    values = array(values)
    fig = go.Figure(
        go.Heatmap(
            z=values,
            x=[str(a) for a in across],
            y=[str(a) for a in down],
            zmin=0,
            zmax=1,
            colorscale="Viridis",
            colorbar=colour_bar(bar),
            text=[[f"{v:.2f}" for v in row] for row in values],
            texttemplate="%{text}",
            hovertemplate=f"{x} %{{x}}, {y} %{{y}}: %{{z:.3f}}<extra></extra>",
        )
    )
    fig.update_xaxes(type="category")
    fig.update_yaxes(type="category")
    return styled(fig, title, subtitle, x=x, y=y, width=620)


def score_against_score(
    frame: Any,
    x: str,
    y: str,
    *,
    title: str,
    subtitle: str = "",
    group: str = "name",
    controls: Sequence[str] = (),
    connect: bool = False,
) -> go.Figure:
    """Column `y` against column `x`, one colour a group; controls grey.

    Args:
        connect: join the dots of a group in the order of the frame.
    """
    fig = go.Figure()
    colours = 0
    for i, name in enumerate(dict.fromkeys(frame[group])):
        part = frame[frame[group] == name]
        control = name in controls
        colour = NULL if control else LINES[colours % len(LINES)]
        colours += not control
        fig.add_scatter(
            x=array(part[x]),
            y=array(part[y]),
            mode="lines+markers" if connect and len(part) > 1 else "markers",
            name=str(name),
            line=dict(color=colour, width=1.5),
            marker=dict(
                color=colour,
                size=10,
                symbol=SYMBOLS[i % len(SYMBOLS)],
                line=dict(color="white", width=1),
            ),
            hovertemplate=f"{x} %{{x:.3g}}<br>{y} %{{y:.3g}}",
        )
    styled(fig, title, subtitle, x=x, y=y)
    return legend_below(fig)
