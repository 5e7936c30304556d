"""Figures about training, scores, firing rates and classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saeutils.plots.style import (
    INK,
    LINES,
    NULL,
    array,
    colour_bar,
    legend_below,
    panel_titles,
    styled,
)


def loss_curves(
    histories: Mapping[str, Any],
    *,
    y: str = "fvu",
    y_title: str = "FVU of the batch",
    title: str = "Training",
    subtitle: str = "",
    log_y: bool = True,
) -> go.Figure:
    """Column `y` over "step" of one history, or of a list of them, for each name.

    Runs of one name (seeds) share colour and legend entry.
    """
    fig = go.Figure()
    for i, (name, runs) in enumerate(histories.items()):
        for j, run in enumerate(runs if isinstance(runs, Sequence) else [runs]):
            fig.add_scatter(
                x=array(run["step"]),
                y=array(run[y]),
                name=name,
                legendgroup=name,
                showlegend=j == 0,
                mode="lines",
                line=dict(color=LINES[i % len(LINES)], width=1.8),
                opacity=1 if j == 0 else 0.55,
            )
    fig.update_layout(showlegend=len(histories) > 1)
    if log_y:
        fig.update_yaxes(type="log", dtick="D2")
    return styled(fig, title, subtitle, x="training step", y=y_title)


def scorecard_table(
    frame: Any,
    title: str = "Scorecard",
    subtitle: str = "",
    metrics_as_rows: bool = True,
) -> go.Figure:
    """A table of a frame with a column "name".

    Args:
        metrics_as_rows: one column an autoencoder; False for one row an autoencoder,
            where there are more of them than metrics.
    """
    names, columns = list(frame["name"]), [c for c in frame if c != "name"]
    cells = [[_text(value) for value in frame[column]] for column in columns]
    if metrics_as_rows:
        header, index = names, columns
        cells = [list(column) for column in zip(*cells, strict=True)]
    else:
        header, index = columns, names
    widest = max(map(len, index))
    align = ["left"] + ["right"] * len(cells)
    stripes = ["white" if i % 2 else "#F2F2F2" for i in range(len(index))]
    per_line = 18 if metrics_as_rows else 14
    fig = go.Figure(
        go.Table(
            columnwidth=[7 * widest + 20] + [7.4 * per_line] * len(cells),
            header=dict(
                values=["", *(f"<b>{text}</b>" for text in header)],
                fill_color="white",
                line_color="white",
                align=align,
                height=44,
            ),
            cells=dict(
                values=[[f"<b>{text}</b>" for text in index], *cells],
                fill_color=[stripes],
                line_color="white",
                align=align,
                height=30,
            ),
        )
    )
    wrapped = [max(-(-len(c[i]) // per_line) for c in cells) for i in range(len(index))]
    longest_header = max(-(-len(text) // per_line) for text in header)
    height = 44 + 15 * longest_header + sum(15 + 15 * lines for lines in wrapped)
    width = 7 * widest + 40 + round(7.4 * per_line) * len(cells)
    styled(fig, title, subtitle, width=width, height=height + (110 if subtitle else 80))
    return fig.update_layout(margin=dict(l=10, r=10, b=0), font_size=12)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int | np.integer) else f"{value:.3g}"


def dots(
    frame: Any,
    value: str,
    *,
    title: str,
    subtitle: str = "",
    x: str | None = None,
    log_x: bool = False,
    controls: Sequence[str] = (),
) -> go.Figure:
    """One dot a run: column `value` for each "name"; those in `controls` in grey."""
    names = list(dict.fromkeys(frame["name"]))
    fig = go.Figure()
    for name in names:
        values = array(frame.loc[frame["name"] == name, value])
        fig.add_scatter(
            x=values,
            y=[name] * len(values),
            mode="markers",
            showlegend=False,
            marker=dict(
                size=11,
                opacity=0.75,
                color=NULL if name in controls else LINES[0],
                line=dict(color="white", width=1),
            ),
        )
    fig.update_xaxes(
        type="log" if log_x else "linear", rangemode="normal" if log_x else "tozero"
    )
    fig.update_yaxes(
        categoryorder="array",
        categoryarray=names[::-1],
        automargin=True,
        ticksuffix="  ",
    )
    height = 150 + 30 * len(names)
    return styled(fig, title, subtitle, x=x or value, height=height)


def density(densities: Mapping[str, Any], title: str = "Firing rates") -> go.Figure:
    """log10 firing rates, one panel a name; dead latents in a bar of their own.

    Args:
        densities: of each name `edges`, `counts`, `dead`, `n_rows`
            (`Scorecard.density`).
    """
    n = len(densities)
    fig = make_subplots(
        n,
        1,
        shared_xaxes=True,
        vertical_spacing=0.25 / n,
        subplot_titles=list(densities),
    )
    low = min(d.edges[0] for d in densities.values())
    dead_x = low - 0.6
    for i, (name, d) in enumerate(densities.items(), start=1):
        edges, counts = array(d.edges), array(d.counts)
        percent = 100 / max(counts.sum() + d.dead, 1)
        fig.add_bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts * percent,
            width=np.diff(edges) * 0.92,
            marker_color=LINES[0],
            name=name,
            customdata=counts,
            hovertemplate="%{customdata} latents (%{y:.1f} %)<extra></extra>",
            row=i,
            col=1,
        )
        fig.add_bar(
            x=[dead_x],
            y=[d.dead * percent],
            width=0.4,
            marker_color=LINES[1],
            text=[f"{d.dead} dead"],
            textposition="outside",
            cliponaxis=False,
            hoverinfo="skip",
            row=i,
            col=1,
        )
    fig.add_vline(x=low - 0.25, line=dict(color=NULL, width=1, dash="dot"))
    powers = np.arange(np.ceil(low), 1)
    fig.update_xaxes(
        tickvals=[dead_x, *powers],
        ticktext=["never", *(f"{100 * 10**p:g} %" for p in powers)],
        range=[dead_x - 0.4, 0.1],
    )
    rows = " / ".join(dict.fromkeys(f"{d.n_rows:,}" for d in densities.values()))
    subtitle = f"How often a latent fires (log scale), counted over {rows} rows"
    styled(fig, title, subtitle, y="% of latents", height=205 + 130 * n)
    fig.update_yaxes(rangemode="tozero")
    fig.update_xaxes(title_text="share of rows on which the latent fires", row=n, col=1)
    return panel_titles(fig).update_layout(showlegend=False)


def cumulative(
    groups: Mapping[str, Any],
    *,
    title: str,
    subtitle: str = "",
    x: str,
    limits: tuple[float, float] | None = None,
    nulls: Sequence[str] = (),
    unit: str = "live latents",
) -> go.Figure:
    """How many of each group lie at or below x; a dot marks the median.

    Nulls and controls are grey and dashed. NaN (dead latents) is left
    out, and so is a group with nothing else.

    Args:
        limits: of the x axis; by default it spans the values, and zero.
    """
    fig = go.Figure()
    dashes = ("dash", "dot", "dashdot")
    every = np.concatenate([array(values) for values in groups.values()])
    limits = limits or (min(0.0, np.nanmin(every)), np.nanmax(every))
    for i, (name, values) in enumerate(groups.items()):
        values = array(values)
        values = np.sort(values[np.isfinite(values)])
        if len(values) == 0:
            continue
        null = name in nulls
        dash = dashes[list(nulls).index(name) % 3] if null else "solid"
        colour = NULL if null else LINES[i % len(LINES)]
        # A thousand points draw the curve, however many values there are.
        rank = np.unique(np.linspace(0, len(values) - 1, 1000).astype(int))
        median = np.median(values)
        label = f"{name}: median {median:.2f} (n = {len(values):,})"
        fig.add_scatter(
            x=[limits[0], *values[rank], limits[1]],
            y=[0, *(100 * (rank + 1) / len(values)), 100],
            line=dict(color=colour, width=2, dash=dash, shape="hv"),
            mode="lines",
            name=label,
            legendgroup=name,
        )
        fig.add_scatter(
            x=[median],
            y=[50],
            mode="markers",
            marker=dict(color=colour, size=10),
            hovertemplate=f"{label}<extra></extra>",
            legendgroup=name,
            showlegend=False,
        )
    fig.update_xaxes(range=limits)
    fig.update_yaxes(range=[0, 101], ticksuffix=" %")
    styled(fig, title, subtitle, x=x, y=f"{unit} at or below", height=460)
    return legend_below(fig).update_layout(margin_b=70 + 22 * len(groups))


def class_profile(
    mean: Any,
    classes: Any,
    latents: Any,
    *,
    title: str = "Class profile",
    subtitle: str = "Of each latent's activation, the part on each class, in %",
) -> go.Figure:
    """Heat map of `mean` activation (latents, classes), each latent summing to 100 %.

    Latents stand in the order given; one that never fires is an empty row.
    """
    mean = array(mean)
    total = mean.sum(1, keepdims=True)
    percent = 100 * mean / np.where(total == 0, 1, total)
    fig = go.Figure(
        go.Heatmap(
            z=percent,
            x=[str(c) for c in array(classes)],
            y=[f"latent {v}" for v in array(latents)],
            zmin=0,
            zmax=100,
            colorscale="Blues",
            xgap=1,
            ygap=1,
            text=[[f"{v:.0f}" if v >= 0.5 else "" for v in row] for row in percent],
            texttemplate="%{text}",
            colorbar=colour_bar("%"),
        )
    )
    fig.update_xaxes(type="category", showgrid=False)
    fig.update_yaxes(
        type="category",
        autorange="reversed",
        automargin=True,
        showgrid=False,
        ticksuffix="  ",
        tickfont_color=INK,
    )
    height = 170 + 26 * len(percent)
    return styled(fig, title, subtitle, x="class", width=620, height=height)
