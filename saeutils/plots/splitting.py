"""Figures of latents that come apart: insertion, stitching, family trees."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saeutils.plots.style import LINES, NULL, array, legend_below, panel_titles, styled


def insertion_by_cosine(
    donors: Mapping[str, tuple[Any, Any]],
    *,
    title: str,
    subtitle: str = "",
    nulls: Sequence[str] = (),
    step: float = 0.1,
    fewest: int = 5,
) -> go.Figure:
    """Share of inserted latents that lower the error, by their nearest cosine.

    Args:
        donors: name -> (largest cosine of each latent with the SAE that it goes into,
            change of FVU when it is inserted alone). NaN is left out.
        nulls: names drawn grey.
        step, fewest: width of a bin, and latents that it needs to be drawn.
    """
    fig = go.Figure()
    edges = np.linspace(0, 1, round(1 / step) + 1)
    for i, (name, (cosine, change)) in enumerate(donors.items()):
        cosine, change = array(cosine), array(change)
        known = np.isfinite(cosine) & np.isfinite(change)
        cosine, lower = cosine[known].clip(0, 1), (change[known] < 0).astype(float)
        total, _ = np.histogram(cosine, edges)
        hits, _ = np.histogram(cosine, edges, weights=lower)
        drawn = total >= fewest
        colour = NULL if name in nulls else LINES[i % len(LINES)]
        dash = "dash" if name in nulls else "solid"
        fig.add_scatter(
            x=((edges[:-1] + edges[1:]) / 2)[drawn],
            y=100 * hits[drawn] / total[drawn],
            customdata=total[drawn],
            mode="lines+markers",
            name=f"{name}: {100 * lower.mean():.0f} % of all",
            line=dict(color=colour, width=2, dash=dash),
            marker=dict(size=4 + 16 * np.sqrt(total[drawn] / total.max()), opacity=0.8),
            hovertemplate="cosine %{x:.2f}: %{y:.0f} % of %{customdata}",
        )
    styled(
        fig,
        title,
        subtitle,
        x="cosine with the nearest latent of the SAE it is put into",
        y="lower the error (% of latents)",
        height=470,
    )
    fig.update_xaxes(range=[0, 1])
    fig.update_yaxes(range=[-4, 104])
    fig = legend_below(fig)
    return fig.update_layout(margin_b=130)


def stitching_paths(
    paths: Mapping[str, Any],
    *,
    title: str,
    subtitle: str = "",
    nulls: Sequence[str] = (),
) -> go.Figure:
    """FVU and L0 on the way from one SAE to another, one line a way.

    Args:
        paths: name -> frame with done (share of latents exchanged), fvu, l0.
        nulls: names drawn grey.
    """
    titles = ("what is missed", "how many latents fire")
    fig = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.12)
    dashes = iter(("dash", "dot", "dashdot") * len(paths))
    for i, (name, frame) in enumerate(paths.items()):
        null = name in nulls
        line = dict(color=NULL if null else LINES[i % len(LINES)], width=2)
        line["dash"] = next(dashes) if null else "solid"
        for column, key in enumerate(("fvu", "l0"), start=1):
            fig.add_scatter(
                x=100 * array(frame["done"]),
                y=array(frame[key]),
                name=name,
                mode="lines",
                line=line,
                legendgroup=name,
                showlegend=column == 1,
                row=1,
                col=column,
            )
    styled(fig, title, subtitle, x="latents exchanged (%)", width=940, height=500)
    fig.update_yaxes(title_text="FVU", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(title_text="L0", rangemode="tozero", row=1, col=2)
    fig = legend_below(panel_titles(fig))
    return fig.update_layout(margin_b=140)


def family_trees(
    trees: Sequence[Sequence[Any]],
    *,
    title: str,
    subtitle: str = "",
    words: int = 4,
) -> go.Figure:
    """Latents of a narrow SAE at the left, what became of them to the right.

    A line is as wide as the share of its parent's rows on which the child fires. Under
    the tokens stands the concept that the latent tells best, with its precision; blue
    where it is the concept of the root, orange where it is another, grey where the
    latent tells none (precision below 0.5).

    Args:
        trees: lists of nodes (`splitting.Node`), each after its parent.
    """
    columns = list(dict.fromkeys(node.sae for tree in trees for node in tree))
    fig, top = go.Figure(), 0.0
    for tree in trees:
        height, top = _heights(tree, top)
        for i, node in enumerate(tree):
            x, y = columns.index(node.sae), -height[i]
            colour = NULL
            if node.precision >= 0.5:
                colour = LINES[0] if node.concept == tree[0].concept else LINES[1]
            if node.above >= 0:
                x0, y0 = x - 1 + 0.66, -height[node.above]
                fig.add_scatter(
                    x=[x0, (x0 + x) / 2, (x0 + x) / 2, x - 0.03],
                    y=[y0, y0, y, y],
                    mode="lines",
                    line=dict(
                        color=colour,
                        width=1 + 11 * node.share,
                        shape="spline",
                        smoothing=0.6,
                    ),
                    opacity=0.45,
                    hoverinfo="skip",
                    showlegend=False,
                )
            tokens = " ".join(_shown(word) for word in node.words[:words])
            told = f"{escape(node.concept)} {node.precision:.0%}".replace("%", " %")
            fig.add_annotation(
                x=x,
                y=y,
                text=f"<b>{tokens}</b><br><span style='color:{colour}'>{told}</span>",
                showarrow=False,
                xanchor="left",
                align="left",
                font_size=11,
            )
        top += 0.7
    for i, name in enumerate(columns):
        text = f"<b>{escape(name)}</b>"
        fig.add_annotation(x=i, y=0.9, text=text, showarrow=False, xanchor="left")
    width = 120 + 330 * len(columns)
    styled(fig, title, subtitle, width=width, height=int(130 + 40 * top))
    fig.update_xaxes(visible=False, range=[-0.03, len(columns) - 0.28])
    fig.update_yaxes(visible=False, range=[-top + 0.4, 1.4])
    return fig.update_layout(margin=dict(l=20, r=20, b=15))


def _heights(tree: Sequence[Any], top: float) -> tuple[list[float], float]:
    """A line for each leaf, parents half-way between their first and last child."""
    children: list[list[int]] = [[] for _ in tree]
    for i, node in enumerate(tree):
        if node.above >= 0:
            children[node.above].append(i)
    height = [0.0] * len(tree)
    for i in range(len(tree)):  # nodes stand after their parents: leaves in order
        if not children[i]:
            height[i], top = top, top + 1
    for i in reversed(range(len(tree))):
        if children[i]:
            height[i] = (height[children[i][0]] + height[children[i][-1]]) / 2
    return height, top


def _shown(token: str) -> str:
    text = escape(token.strip().replace("\n", "⏎"))
    return text or "␣"
