"""A latent on one page: what excites it, what it does, and what it resembles."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saeutils.plots.style import CLASSES, LINES, array, panel_titles, styled

COLUMNS = 6  # images beside each other


def feature_card(card: Any) -> go.Figure:
    """Everything about one latent (`cards.Card`), one figure a page.

    Strongest images, a picture by ascent, histogram of activations, class profile,
    effect on logits, nearest latents by their strongest image; in words, what the
    model does without it, and its meta-latents.
    """
    classes = [str(c) for c in array(card.classes).tolist()]
    fig = make_subplots(
        3,
        6,
        specs=[
            [dict(colspan=4), None, None, None, dict(colspan=2), None],
            [dict(colspan=2), None, dict(colspan=2), None, dict(colspan=2), None],
            [dict(colspan=4), None, None, None, dict(colspan=2), None],
        ],
        subplot_titles=[
            "Strongest images: label · activation",
            f"By ascent: {card.picture_ratio:.2f} × maximum",
            "Activations where it fires",
            "Mean activation by class",
            "Effect on logits (mean)",
            "Nearest latents: cosine of decoder rows",
            "In the model, and parts",
        ],
        row_heights=[0.38, 0.32, 0.3],
        vertical_spacing=0.1,
        horizontal_spacing=0.09,
    )
    panel_titles(fig)  # before the texts under images, which are annotations too
    labels, values = array(card.labels), array(card.values)
    texts = [f"{c} · {v:.3g}" for c, v in zip(labels, values, strict=True)]
    _images(fig, array(card.images), texts, COLUMNS, row=1, col=1, least_rows=2)
    answer = [f"the model sees {card.picture_answer}"]
    _images(fig, 255 * array(card.picture)[None], answer, 1, row=1, col=5)
    edges = array(card.edges)
    fig.add_bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=array(card.counts),
        width=np.diff(edges) * 0.95,
        marker_color=LINES[0],
        hovertemplate="%{x:.2f}: %{y} images<extra></extra>",
        row=2,
        col=1,
    )
    colours = [CLASSES[i % len(CLASSES)] for i in range(len(classes))]
    fig.add_bar(
        x=classes,
        y=array(card.class_mean),
        marker_color=colours,
        customdata=100 * array(card.class_share),
        hovertemplate="%{x}: %{y:.3g}; fires on %{customdata:.1f} %<extra></extra>",
        row=2,
        col=3,
    )
    logits = array(card.effect.logits)
    fig.add_bar(
        x=[str(i) for i in range(len(logits))],
        y=logits,
        marker_color=[LINES[2] if v >= 0 else LINES[1] for v in logits],
        hovertemplate="logit %{x}: %{y:+.3f}<extra></extra>",
        row=2,
        col=5,
    )
    texts = [f"latent {i}<br>{cosine:.2f}" for i, cosine in card.neighbours]
    near = array(card.neighbour_images)
    _images(fig, near, texts, max(len(near), 1), row=3, col=1)
    fig.update_xaxes(visible=False, row=3, col=5)
    fig.update_yaxes(visible=False, row=3, col=5)
    share = card.firing_count / card.n_rows
    styled(
        fig,
        f"Latent {card.latent} of {card.hook}: prefers {card.top_class}",
        f"selectivity {card.selectivity:.2f} · class entropy {card.entropy:.2f} bits · "
        f"fires on {card.firing_count:,} of {card.n_rows:,} images ({share:.2%})",
        width=960,
        height=800,
    )
    words = fig.get_subplot(3, 5)
    fig.add_annotation(
        x=words.xaxis.domain[0],
        y=words.yaxis.domain[1],
        xref="paper",
        yref="paper",
        text=_words(card),
        showarrow=False,
        align="left",
        xanchor="left",
        yanchor="top",
        font_size=12,
    )
    axes = ((1, "activation", "images"), (3, "class", ""), (5, "class", "logit"))
    for col, x, y in axes:
        fig.update_xaxes(title_text=x, row=2, col=col)
        fig.update_yaxes(title_text=y, nticks=5, row=2, col=col)
    for col in (3, 5):
        fig.update_xaxes(type="category", tickangle=0, row=2, col=col)
    fig.update_yaxes(type="log", dtick=1, row=2, col=1)
    return fig.update_layout(showlegend=False, margin=dict(t=115, b=25))


def _images(
    fig: go.Figure,
    images: np.ndarray,
    texts: list[str],
    columns: int,
    *,
    row: int,
    col: int,
    least_rows: int = 1,
) -> None:
    """Grey images on one pair of axes, ink dark, with a text under each."""
    h, w = images.shape[1:] if len(images) else (28, 28)
    rows = max(-(-len(images) // columns), least_rows)
    below = 6 + 6 * max((t.count("<br>") for t in texts), default=0)
    canvas = np.zeros((rows * (h + below), columns * (w + 4)))
    for i, image in enumerate(images):
        y, x = (i // columns) * (h + below), (i % columns) * (w + 4)
        canvas[y : y + h, x : x + w] = image
    fig.add_heatmap(
        z=np.rint(canvas).astype(np.uint8),
        zmin=0,
        zmax=255,
        colorscale=[[0, "white"], [1, "black"]],
        showscale=False,
        hoverinfo="skip",
        row=row,
        col=col,
    )
    for i, text in enumerate(texts):
        fig.add_annotation(
            x=(i % columns) * (w + 4) + w / 2,
            y=(i // columns) * (h + below) + h - 0.5,
            text=text,
            showarrow=False,
            yanchor="top",
            font_size=10,
            row=row,
            col=col,
        )
    fig.update_xaxes(visible=False, row=row, col=col)
    fig.update_yaxes(
        visible=False,
        range=[canvas.shape[0] - 0.5, -0.5],
        scaleanchor=fig.get_subplot(row, col).xaxis.plotly_name.replace("axis", ""),
        constrain="domain",
        row=row,
        col=col,
    )


def _words(card: Any) -> str:
    e = card.effect
    lines = ["fires on no test image"]
    if e.n:
        lines = [
            f"On {e.n:,} test images it fires. Without it",
            f"accuracy there {e.accuracy_before:.1%} → {e.accuracy_after:.1%},",
            f"answers that change: {e.changed}",
            f"(a random direction: {e.changed_by_chance}).",
        ]
    lines.append("")
    for m, weight, others in card.metas:
        more = ", ".join(map(str, others)) or "no other"
        lines.append(f"meta-latent {m} ({weight:.2f}):<br>  also in {more}")
    return "<br>".join(lines)
