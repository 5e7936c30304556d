"""What scores between two models say, where the true answer is known."""

from collections.abc import Mapping
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

SYMBOLS = ("circle", "diamond", "square", "triangle-up")


def against_truth(
    frame: Any,
    scores: Mapping[str, str],
    *,
    x: str,
    group: str,
    nulls: Any,
    ceilings: Mapping[str, float],
    title: str,
    subtitle: str = "",
    x_name: str,
    across: int = 4,
) -> go.Figure:
    """One panel a score, one line a `group`; grey diagonal: what a true score says.

    Args:
        frame: columns `x` (0 … 1), `group`, and the scores; dots are its rows, lines
            their means.
        scores: column -> its name.
        nulls: columns as the scores: a grey band from the smallest to the largest.
        ceilings: of a score what the same model gets: a dashed line.
    """
    down = -(-len(scores) // across)
    fig = make_subplots(
        down,
        across,
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=list(scores.values()),
        horizontal_spacing=0.03,
        vertical_spacing=0.22 / down,
    )
    groups = list(dict.fromkeys(frame[group]))
    for i, score in enumerate(scores):
        where = dict(row=i // across + 1, col=i % across + 1)
        once = dict(showlegend=i == 0)
        low, high = nulls[score].min(), nulls[score].max()  # of those that are not NaN
        band = dict(mode="lines", line_width=0, legendgroup="null", hoverinfo="skip")
        fig.add_scatter(x=[0, 1], y=[low, low], showlegend=False, **band, **where)
        fill = dict(fill="tonexty", fillcolor="rgba(138,138,138,0.4)")
        top = dict(x=[0, 1], y=[high, high], name="permuted rows")
        fig.add_scatter(**top, **fill, **band, **once, **where)
        guides = {"the true share": ([0, 1], "dot", NULL)}
        if np.isfinite(ceilings.get(score, np.nan)):
            level = [ceilings[score]] * 2
            guides["same model, another seed"] = (level, "dash", "#000000")
        for name, (level, dash, colour) in guides.items():
            fig.add_scatter(
                x=[0, 1],
                y=level,
                mode="lines",
                name=name,
                legendgroup=name,
                line=dict(dash=dash, color=colour, width=1.5),
                hoverinfo="skip",
                **once,
                **where,
            )
        for j, value in enumerate(groups):
            part = frame[frame[group] == value]
            mean = part.groupby(x)[score].mean()
            look = dict(color=LINES[j % len(LINES)])
            both = dict(name=str(value), legendgroup=str(value))
            fig.add_scatter(
                x=list(mean.index),
                y=array(mean),
                mode="lines",
                line=look,
                hoverinfo="skip",
                showlegend=False,
                **both,
                **where,
            )
            fig.add_scatter(
                x=array(part[x]),
                y=array(part[score]),
                mode="markers",
                marker=look | dict(size=7, symbol=SYMBOLS[j % len(SYMBOLS)]),
                hovertemplate=f"{x_name} %{{x}}: %{{y:.3f}}",
                **both,
                **once,
                **where,
            )
    fig.update_yaxes(range=[-0.08, 1.08], tickvals=[0, 0.5, 1])
    fig.update_xaxes(range=[-0.05, 1.05], tickvals=[0, 0.5, 1])
    fig.update_xaxes(title_text=x_name, row=down)
    fig.update_yaxes(title_text="score", col=1)
    styled(fig, title, subtitle, width=980, height=190 + 235 * down)
    return panel_titles(legend_below(fig))


def misreadings(
    panels: Mapping[str, tuple[Any, float]],
    *,
    title: str,
    subtitle: str = "",
) -> go.Figure:
    """Heat maps of score − truth, one below the other; the score stands in the cell.

    Args:
        panels: title -> (frame of scores, an index a line and a column a score; what
            all of them ought to be). NaN: nothing is drawn.
    """
    lines = [len(frame) for frame, _ in panels.values()]
    gap = 40  # pixels, for the title of a panel
    inner = 24 * sum(lines) + gap * (len(lines) - 1)
    fig = make_subplots(
        len(panels),
        1,
        shared_xaxes=True,
        subplot_titles=list(panels),
        row_heights=lines,
        vertical_spacing=gap / inner if len(panels) > 1 else 0,
    )
    for i, (frame, truth) in enumerate(panels.values()):
        values = array(frame.to_numpy(float))
        fig.add_heatmap(
            z=values - truth,
            x=list(frame.columns),
            y=list(frame.index),
            text=[[f"{v:.2f}" if np.isfinite(v) else "" for v in r] for r in values],
            texttemplate="%{text}",
            textfont_size=11,
            coloraxis="coloraxis",
            hovertemplate="%{y}, %{x}: %{text}<extra></extra>",
            row=i + 1,
            col=1,
        )
    scale = dict(cmin=-0.5, cmax=0.5, colorscale="RdBu", reversescale=True)
    bar = colour_bar("says too<br>much by", lenmode="pixels", len=260)
    fig.update_layout(coloraxis=dict(colorbar=bar, **scale))
    ticks = dict(ticksuffix="  ", tickfont_size=11, showgrid=False)
    fig.update_yaxes(autorange="reversed", automargin=True, **ticks)
    fig.update_xaxes(tickangle=-30, showgrid=False)
    styled(fig, title, subtitle, width=900, height=inner + 200)
    return panel_titles(fig).update_layout(margin_b=85)
