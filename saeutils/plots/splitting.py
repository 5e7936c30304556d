"""Figures of latents that come apart: insertion, stitching, family trees."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saeutils.plots.style import LINES, NULL, array, legend_below, panel_titles, styled


def insertions(
    donors: Mapping[str, tuple[Any, Any, Any]],
    *,
    title: str,
    subtitle: str = "",
    nulls: Sequence[str] = (),
    fewest: int = 5,
) -> go.Figure:
    """Share of inserted latents that lower the error, by nearest cosine and by rate.

    Args:
        donors: name -> (largest cosine of each latent with the SAE that it goes into,
            its firing rate, change of FVU when it is inserted alone).
        nulls: names drawn grey.
        fewest: latents that a bin needs to be drawn; dots grow with their number.
    """
    titles = ("by direction", "by how often they fire")
    fig = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True)
    edges = [np.linspace(0, 1, 11), 10 ** np.arange(-4.5, 0.26, 0.25)]
    for i, (name, donor) in enumerate(donors.items()):
        *values, change = (array(part) for part in donor)
        lower = (change < 0).astype(float)
        null = name in nulls
        colour = NULL if null else LINES[i % len(LINES)]
        for column, (x, cuts) in enumerate(zip(values, edges, strict=True), start=1):
            total, _ = np.histogram(x.clip(cuts[0], cuts[-1]), cuts)
            hits, _ = np.histogram(x.clip(cuts[0], cuts[-1]), cuts, weights=lower)
            drawn = total >= fewest
            middle = (cuts[:-1] + cuts[1:]) / 2
            if column == 2:
                middle = np.sqrt(cuts[:-1] * cuts[1:])
            fig.add_scatter(
                x=middle[drawn],
                y=100 * hits[drawn] / total[drawn],
                customdata=total[drawn],
                mode="lines+markers",
                name=f"{name}: {100 * lower.mean():.0f} % of all",
                legendgroup=name,
                showlegend=column == 1,
                line=dict(color=colour, width=2, dash="dash" if null else "solid"),
                marker=dict(size=4 + 14 * np.sqrt(total[drawn] / max(total.max(), 1))),
                hovertemplate="%{x:.3g}: %{y:.0f} % of %{customdata} latents",
                row=1,
                col=column,
            )
    styled(fig, title, subtitle, width=860, height=480)
    fig.update_xaxes(title_text="cosine with the nearest latent", range=[0, 1], col=1)
    fig.update_xaxes(
        title_text="firing rate (share of tokens, log scale)", type="log", col=2
    )
    fig.update_xaxes(tickvals=[1e-4, 1e-3, 1e-2, 0.1, 1], col=2)
    fig.update_yaxes(title_text="lower the error (% of latents)", col=1)
    fig.update_yaxes(range=[-4, 104])
    return legend_below(panel_titles(fig)).update_layout(margin_b=120)


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
    styled(fig, title, subtitle, x="latents exchanged (%)", width=860, height=460)
    fig.update_yaxes(title_text="FVU", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(title_text="L0", rangemode="tozero", row=1, col=2)
    fig = legend_below(panel_titles(fig))
    return fig.update_layout(margin_b=120)


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
                x0, y0, x1 = x - 0.32, -height[node.above], x - 0.02
                m = (x0 + x1) / 2
                fig.add_shape(
                    type="path",
                    path=f"M {x0},{y0} C {m},{y0} {m},{y} {x1},{y}",
                    line=dict(color=colour, width=1 + 13 * node.share),
                    opacity=0.45,
                )
            tokens = _shown(node.words[:words])
            told = f"{escape(node.concept)} {node.precision:.0%}".replace("%", " %")
            fig.add_annotation(
                x=x,
                y=y,
                text=f"<b>{tokens}</b><br><span style='color:{colour}'>{told}</span>",
                showarrow=False,
                xanchor="left",
                align="left",
                font_size=13,
            )
        top += 0.6
    for i, name in enumerate(columns):
        text = f"<b>{escape(name)}</b>"
        fig.add_annotation(x=i, y=0.9, text=text, showarrow=False, xanchor="left")
    width = 40 + 265 * len(columns)
    fig.add_scatter(x=[0], y=[0], mode="markers", marker_opacity=0, showlegend=False)
    styled(fig, title, subtitle, width=width, height=int(120 + 46 * (top + 1)))
    fig.update_xaxes(visible=False, range=[-0.03, len(columns) - 0.25])
    fig.update_yaxes(visible=False, range=[-top + 0.5, 1.3])
    return fig.update_layout(margin=dict(l=15, r=10, b=10))


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


def _shown(words: Sequence[str], longest: int = 24) -> str:
    """As many words as fit, at least one."""
    texts = [word.strip().replace("\n", "⏎") or "␣" for word in words]
    while len(texts) > 1 and len(" ".join(texts)) > longest:
        texts.pop()
    return escape(" ".join(texts), quote=False)
