"""The look that all figures share, and what their functions need in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

# Okabe and Ito (2008) without yellow; ten classes by Tol (2012).
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CLASSES = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933"),
    *("#DDCC77", "#661100", "#CC6677", "#882255", "#AA4499"),
)
NULL = "#8A8A8A"  # controls, nulls and dead latents
INK = "#222222"


def styled(
    fig: go.Figure,
    title: str,
    subtitle: str = "",
    *,
    x: str | None = None,
    y: str | None = None,
    width: int = 760,
    height: int = 420,
) -> go.Figure:
    """House style: title, and what to know before reading, at the left; named axes."""
    fig.update_layout(
        template="plotly_white",
        font=dict(family="Helvetica, Arial, sans-serif", size=13, color=INK),
        title=dict(text=title, subtitle=dict(text=subtitle), x=0, xref="paper"),
        colorway=LINES,
        width=width,
        height=height,
        margin=dict(l=70, r=30, t=90 if subtitle else 60, b=60),
        legend=dict(itemsizing="constant"),
        hoverlabel=dict(bgcolor="white"),
        bargap=0.06,
    )
    fig.update_xaxes(title_font_size=13, **({} if x is None else {"title_text": x}))
    fig.update_yaxes(title_font_size=13, **({} if y is None else {"title_text": y}))
    return fig


def colour_bar(text: str, **options: Any) -> dict[str, Any]:
    """A slim colour bar with a name."""
    return dict(title=dict(text=text, font_size=13), thickness=12, **options)


def legend_below(fig: go.Figure) -> go.Figure:
    """The legend in a row of its own under the axis title."""
    return fig.update_layout(
        margin_b=100,
        legend=dict(orientation="h", x=0, y=0.01, yref="container", yanchor="bottom"),
    )


def panel_titles(fig: go.Figure, size: int = 13) -> go.Figure:
    """Titles of sub-plots in bold, clear of the subtitle of the figure."""
    for annotation in fig.layout.annotations:
        annotation.update(text=f"<b>{annotation.text}</b>", font_size=size)
    return fig.update_layout(margin_t=115)


def name_rows(fig: go.Figure, titles: Sequence[str], pitch: int, height: int) -> int:
    """Titles at the left of rows of images; returns the margin that they need.

    pitch, height: of a row and of the images in it, in image pixels.
    """
    for i, text in enumerate(titles):
        fig.add_annotation(
            x=0,
            xref="paper",
            xshift=-8,
            y=i * pitch + (height - 1) / 2,
            text=text,
            showarrow=False,
            xanchor="right",
            align="right",
            font_size=11,
        )
    longest = max((len(p) for t in titles for p in t.split("<br>")), default=0)
    return 20 + 6 * longest


def name_lines(fig: go.Figure, line: Mapping[str, int]) -> go.Figure:
    """Names at the left of lines of dots; line: name -> its height, 0, −1, …"""
    return fig.update_yaxes(
        tickvals=list(line.values()),
        ticktext=list(line),
        range=[0.6 - len(line), 0.6],
        automargin=True,
        zeroline=False,
        ticksuffix="  ",
    )


def array(x: Any) -> np.ndarray:
    """A numpy array of a tensor, an array, a column or a list."""
    return x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)


def spread(runs: Any) -> dict[str, Any]:
    """Error bars from the mean of each group of runs (of pandas) to its extremes."""
    mean = runs.mean()
    return dict(
        array=array(runs.max() - mean),
        arrayminus=array(mean - runs.min()),
        thickness=1.5,
        width=4,
        visible=bool((runs.size() > 1).any()),
    )
