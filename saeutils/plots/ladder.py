"""What each step of a recipe does to several scores: one panel a score."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saeutils.plots.style import (
    LINES,
    NULL,
    array,
    legend_below,
    name_lines,
    panel_titles,
    styled,
)

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")


def ladder(
    frame: Any,
    columns: Sequence[str],
    *,
    group: str,
    title: str,
    subtitle: str = "",
    nulls: Mapping[str, float] | None = None,
    across: int = 3,
) -> go.Figure:
    """One panel a column, one line a "name", one dot a run, one colour a `group`.

    Names stand from top to bottom as they first appear in the frame.

    Args:
        group: column that tells runs of one name apart, e.g. the learning rate.
        nulls: of a column the value that chance gives: a dotted line.
        across: panels beside each other.
    """
    names = list(dict.fromkeys(frame["name"]))
    groups = list(dict.fromkeys(frame[group]))
    down = -(-len(columns) // across)
    fig = make_subplots(
        down,
        across,
        shared_yaxes=True,
        subplot_titles=list(columns),
        horizontal_spacing=0.03,
        vertical_spacing=0.25 / down,
    )
    line = {name: -i for i, name in enumerate(names)}
    for i, column in enumerate(columns):
        where = dict(row=i // across + 1, col=i % across + 1)
        for j, value in enumerate(groups):
            part = frame[frame[group] == value]
            # Groups stand a little apart, so that equal values do not hide each other.
            shift = 0.5 * ((len(groups) - 1) / 2 - j) / len(groups)
            fig.add_scatter(
                x=array(part[column]),
                y=[line[name] + shift for name in part["name"]],
                mode="markers",
                name=str(value),
                legendgroup=str(value),
                showlegend=i == 0,
                customdata=list(part["name"]),
                hovertemplate="%{customdata}: %{x:.3g}",
                marker=dict(
                    size=8,
                    opacity=0.75,
                    symbol=SYMBOLS[j % len(SYMBOLS)],
                    color=LINES[j % len(LINES)],
                    line=dict(color="white", width=1),
                ),
                **where,
            )
        # Zero is in the panel, and dots on it are clear of the names.
        values = array(frame[column])
        low, high = min(0.0, np.nanmin(values)), max(0.0, np.nanmax(values))
        margin = 0.05 * (high - low) or 1.0
        fig.update_xaxes(range=[low - margin, high + margin], nticks=5, **where)
        if nulls and column in nulls:
            null = dict(color=NULL, width=1.5, dash="dot")
            fig.add_vline(x=nulls[column], line=null, **where)
    name_lines(fig, line)
    height = 200 + down * (60 + 26 * len(names))
    styled(fig, title, subtitle, width=980, height=height)
    return panel_titles(legend_below(fig)).update_layout(legend_title_text=group)
