"""Differences from a baseline with their intervals: one panel a score."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saeutils.plots.style import NULL, legend_below, name_lines, panel_titles, styled

VERDICTS = {"better": "#009E73", "worse": "#D55E00", "unclear": NULL}
SYMBOLS = {"better": "circle", "worse": "x", "unclear": "circle-open"}


def intervals(
    differences: Any,
    *,
    title: str,
    subtitle: str = "",
    columns: Sequence[str] | None = None,
    across: int = 3,
) -> go.Figure:
    """One panel a score, one line a name: mean difference and interval; 0 is dotted.

    Colour and symbol say the verdict. Names stand from top to bottom as they first
    appear.

    Args:
        differences: "name", "column", "sign", "value", "runs", "difference", "high",
            "verdict" (`comparison.paired_differences`).
        columns: the scores to draw, in order; by default all.
        across: panels beside each other.
    """
    columns = list(columns or dict.fromkeys(differences["column"]))
    names = list(dict.fromkeys(differences["name"]))
    signs = dict(zip(differences["column"], differences["sign"], strict=True))
    line = {name: -i for i, name in enumerate(names)}
    down = -(-len(columns) // across)
    gap = 70  # pixels, for the numbers of one row of panels and the titles of the next
    inner = down * 26 * len(names) + (down - 1) * gap
    fig = make_subplots(
        down,
        across,
        shared_yaxes=True,
        subplot_titles=[
            f"{column} ({'more' if signs[column] > 0 else 'less'} is better)"
            for column in columns
        ],
        horizontal_spacing=0.03,
        vertical_spacing=gap / inner if down > 1 else 0,
    )
    shown = set()
    for i, column in enumerate(columns):
        where = dict(row=i // across + 1, col=i % across + 1)
        part = differences[differences["column"] == column]
        for verdict, colour in VERDICTS.items():
            some = part[part["verdict"] == verdict]
            if some.empty:
                continue
            fig.add_scatter(
                x=some["difference"],
                y=[line[name] for name in some["name"]],
                error_x=dict(
                    array=some["high"] - some["difference"], thickness=2, width=4
                ),
                mode="markers",
                name=verdict,
                legendgroup=verdict,
                showlegend=verdict not in shown,
                marker=dict(size=9, color=colour, symbol=SYMBOLS[verdict]),
                customdata=some[["name", "value", "runs"]],
                hovertemplate="%{customdata[0]}: %{x:.3g} (mean %{customdata[1]:.3g}, "
                "%{customdata[2]} runs)<extra></extra>",
                **where,
            )
            shown.add(verdict)
        fig.add_vline(x=0, line=dict(color=NULL, width=1.5, dash="dot"), **where)
        fig.update_xaxes(nticks=5, zeroline=False, **where)
    name_lines(fig, line)
    styled(fig, title, subtitle, width=980, height=inner + 215)
    fig.update_layout(legend_title_text="by the interval")
    return panel_titles(legend_below(fig))
