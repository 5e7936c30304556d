"""Figures of what an edit of a model does: before and after."""

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
    legend_below,
    panel_titles,
    spread,
    styled,
)

_SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up", "x")


def shifted_tokens(
    tokens: Sequence[str],
    probabilities: Mapping[str, Any],
    *,
    marked: Sequence[bool] = (),
    title: str,
    subtitle: str = "",
) -> go.Figure:
    """Probability of the next token, one line a token, one dot a version of the model.

    Args:
        tokens: what stands on the lines, from top to bottom.
        probabilities: version -> one a token; the first is the model untouched.
        marked: tokens in bold, as those of a concept.
    """
    marked = list(marked) or [False] * len(tokens)
    names = [
        f"<b>“{_shown(t)}”</b>" if bold else f"“{_shown(t)}”"
        for t, bold in zip(tokens, marked, strict=True)
    ]
    fig = go.Figure()
    values = np.stack([array(p) for p in probabilities.values()])
    y = -np.arange(len(tokens))
    for at, low, high in zip(y, values.min(0), values.max(0), strict=True):
        fig.add_scatter(
            x=[low, high],
            y=[at, at],
            mode="lines",
            line=dict(color="#DDDDDD", width=3),
            showlegend=False,
            hoverinfo="skip",
        )
    for i, name in enumerate(probabilities):
        fig.add_scatter(
            x=values[i],
            y=y,
            name=name,
            mode="markers",
            marker=dict(
                size=11 if i else 16,
                symbol=_SYMBOLS[i % len(_SYMBOLS)] if i else "circle-open",
                color=LINES[(i - 1) % len(LINES)] if i else INK,
                line=dict(color="white", width=1) if i else dict(width=2),
            ),
        )
    fig.update_yaxes(
        tickvals=y, ticktext=names, range=[0.6 - len(tokens), 0.6], zeroline=False
    )
    fig.update_yaxes(automargin=True, ticksuffix="  ")
    fig.update_xaxes(rangemode="tozero")
    height = 190 + 25 * len(tokens)
    styled(fig, title, subtitle, x="probability of the next token", height=height)
    return legend_below(fig)


def _shown(token: str) -> str:
    token = token.replace("\n", "⏎").strip() or token.replace("\n", "⏎")
    return token.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def before_after(
    before: Any,
    panels: Mapping[str, Any],
    marked: Mapping[str, Sequence[int]],
    *,
    title: str,
    subtitle: str = "",
    x: str = "mean code before",
    y: str = "mean code after",
    floor: float = 1e-3,
) -> go.Figure:
    """One dot a latent, before against after; on the diagonal nothing has changed.

    Both axes are logarithmic; what is below `floor` stands on it.

    Args:
        before: one value a latent.
        panels: what was done -> one value a latent after it.
        marked: name -> latents that are drawn in a colour of their own.
    """
    fig = make_subplots(
        1, len(panels), subplot_titles=list(panels), shared_yaxes=True
    ).update_xaxes(type="log")
    before = np.maximum(array(before), floor)
    every = [before, *(array(v) for v in panels.values())]
    ends = [np.log10(floor) - 0.15, np.log10(max(v.max() for v in every)) + 0.2]
    rest = np.ones(len(before), bool)
    for latents in marked.values():
        rest[list(latents)] = False
    groups = {"other latents": np.flatnonzero(rest)}
    groups |= {name: np.array(list(v), int) for name, v in marked.items()}
    for column, after in enumerate(panels.values(), start=1):
        after = np.maximum(array(after), floor)
        fig.add_scatter(
            x=[10**e for e in ends],
            y=[10**e for e in ends],
            mode="lines",
            line=dict(color=NULL, dash="dot", width=1),
            name="unchanged",
            showlegend=column == 1,
            row=1,
            col=column,
        )
        for i, (name, latents) in enumerate(groups.items()):
            fig.add_scatter(
                x=before[latents],
                y=after[latents],
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                text=[f"latent {j}" for j in latents],
                hovertemplate="%{text}: %{x:.3g} → %{y:.3g}<extra></extra>",
                marker=dict(
                    size=5 if i == 0 else 12,
                    opacity=0.45 if i == 0 else 1,
                    color=LINES[0] if i == 0 else LINES[i % len(LINES)],
                    symbol=_SYMBOLS[i % len(_SYMBOLS)],
                ),
                row=1,
                col=column,
            )
    width = 100 + 400 * len(panels)
    styled(fig, title, subtitle, x=x, width=width, height=540)
    fig.update_yaxes(type="log", range=ends).update_xaxes(range=ends)
    fig.update_yaxes(title_text=y, col=1)
    fig.update_xaxes(dtick=1).update_yaxes(dtick=1)
    return panel_titles(legend_below(fig))


def moved_points(
    panels: Mapping[str, Mapping[str, Any]],
    ground: Any,
    *,
    title: str,
    subtitle: str = "",
) -> go.Figure:
    """The same map in every panel, with other points in colour.

    Args:
        panels: heading -> name of a group -> its points (n, 2).
        ground: all points (n, 2), in grey beneath.
    """
    fig = make_subplots(
        1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.03
    )
    ground = array(ground)
    names = list(dict.fromkeys(name for p in panels.values() for name in p))
    seen = set()
    for column, groups in enumerate(panels.values(), start=1):
        fig.add_scatter(
            x=ground[:, 0],
            y=ground[:, 1],
            mode="markers",
            marker=dict(size=3, color="#DADADA"),
            hoverinfo="skip",
            name="all",
            showlegend=column == 1,
            row=1,
            col=column,
        )
        for name, points in groups.items():
            points = array(points)
            i = names.index(name)
            fig.add_scatter(
                x=points[:, 0],
                y=points[:, 1],
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=name not in seen,
                marker=dict(
                    size=5,
                    color=LINES[i % len(LINES)],
                    opacity=0.75,
                    symbol=_SYMBOLS[i],
                ),
                hoverinfo="name",
                row=1,
                col=column,
            )
            seen.add(name)
    low, high = ground.min(0), ground.max(0)
    pad = 0.05 * (high - low)
    styled(fig, title, subtitle, width=60 + 310 * len(panels), height=500)
    for axis, i in ((fig.update_xaxes, 0), (fig.update_yaxes, 1)):
        ends = [low[i] - pad[i], high[i] + pad[i]]
        axis(range=ends, showticklabels=False, zeroline=False, showgrid=False)
    fig.update_xaxes(title_text="UMAP 1")
    fig.update_yaxes(title_text="UMAP 2", col=1)
    return panel_titles(legend_below(fig))


def ranges(
    frame: Any,
    *,
    x: str,
    y: str,
    title: str,
    subtitle: str = "",
    controls: Sequence[str] = (),
    levels: Mapping[str, float] | None = None,
    log_y: bool = False,
) -> go.Figure:
    """Mean over runs against x, one line a "name"; bars span the runs.

    Args:
        frame: a row a run and x, with "name", "x" and "y"; x is logarithmic.
        x, y: names of the axes; controls: names drawn dashed and grey.
        levels: name -> a value of y to mark across, dotted.
    """
    fig = go.Figure()
    greys = iter((NULL, "#5A5A5A", "#B5B5B5"))
    colours = iter(LINES * 3)
    for i, (name, part) in enumerate(frame.groupby("name", sort=False)):
        runs = part.groupby("x")["y"]
        mean, null = runs.mean(), name in controls
        fig.add_scatter(
            x=list(mean.index),
            y=array(mean),
            error_y=spread(runs),
            name=str(name),
            mode="lines+markers",
            line=dict(
                color=next(greys, NULL) if null else next(colours),
                dash="dash" if null else "solid",
                width=2,
            ),
            marker=dict(size=8, symbol=_SYMBOLS[i % len(_SYMBOLS)]),
        )
    for value, name in _together(levels or {}).items():
        fig.add_hline(y=value, line=dict(color=NULL, dash="dot"))
        fig.add_annotation(
            x=0,
            xref="paper",
            y=np.log10(value) if log_y else value,
            text=name,
            font_color=NULL,
            showarrow=False,
            xanchor="left",
            yanchor="bottom",
        )
    at = sorted(set(frame["x"]))
    fig.update_xaxes(type="log", tickvals=at, ticktext=[f"{v:.2g}" for v in at])
    if max(at) >= 100:
        fig.update_xaxes(ticktext=[f"{v:g}" for v in at])
    if log_y:
        fig.update_yaxes(type="log", dtick=1)
    styled(fig, title, subtitle, x=x, y=y, width=820, height=500)
    return legend_below(fig)


def _together(levels: Mapping[str, float], near: float = 0.03) -> dict[float, str]:
    """Levels so close that their names would overlap, as one: value -> names."""
    out: dict[float, str] = {}
    for name, value in sorted(levels.items(), key=lambda item: item[1]):
        last = next(reversed(out), None)
        if last is not None and abs(value - last) <= near:
            out[last] += f"; {name}"
        else:
            out[value] = name
    return out


def success_rates(
    frame: Any,
    *,
    title: str,
    subtitle: str = "",
    controls: Sequence[str] = (),
    left: str = "share of texts with a word of the concept",
    right: str = "cost to the untouched model (nats a token)",
) -> go.Figure:
    """Success and damage side by side: one block a concept, one line an arm.

    Args:
        frame: "concept", "arm", "rate", "low", "high", "nats", "nats_error".
        controls: arms in grey.
    """
    concepts = list(dict.fromkeys(frame["concept"]))
    arms = list(dict.fromkeys(frame["arm"]))
    block = len(arms) + 1
    colours = iter(LINES)
    greys = iter((NULL, "#5A5A5A", "#B5B5B5"))
    fig = make_subplots(
        1, 2, shared_yaxes=True, subplot_titles=[left, right], horizontal_spacing=0.04
    )
    lines = {}
    for i, arm in enumerate(arms):
        part = frame[frame["arm"] == arm]
        y = [-(concepts.index(c) * block + i) for c in part["concept"]]
        colour = next(greys, NULL) if arm in controls else next(colours)
        rate, nats = array(part["rate"]), array(part["nats"])
        errors = (
            dict(array=part["high"] - rate, arrayminus=rate - part["low"]),
            dict(array=part["nats_error"]),
        )
        for column, (values, error) in enumerate(
            zip((rate, nats), errors, strict=True), start=1
        ):
            fig.add_scatter(
                x=values,
                y=y,
                error_x=dict(**error, thickness=2, width=3),
                mode="markers",
                name=arm,
                legendgroup=arm,
                showlegend=column == 1,
                marker=dict(size=9, color=colour, symbol=_SYMBOLS[i % len(_SYMBOLS)]),
                row=1,
                col=column,
            )
    for j, concept in enumerate(concepts):
        lines[f"<b>{concept}</b>"] = -(j * block + (len(arms) - 1) / 2)
        if j:
            fig.add_hline(y=1 - j * block, line=dict(color="#DDDDDD", width=1))
    height = 230 + 17 * block * len(concepts)
    styled(fig, title, subtitle, width=900, height=height)
    fig.update_yaxes(
        tickvals=list(lines.values()),
        ticktext=list(lines),
        range=[1.4 - block * len(concepts), 0.8],
        automargin=True,
        showgrid=False,
        zeroline=False,
        ticksuffix="  ",
    )
    fig.update_xaxes(rangemode="tozero")
    fig.update_xaxes(range=[-0.02, 1.02], col=1)
    return panel_titles(legend_below(fig))
