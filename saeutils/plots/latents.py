"""Figures of what a latent of a language model does."""

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
    panel_titles,
    styled,
)
from saeutils.plots.text import Page, escaped


def contexts(
    sections: Mapping[str, Sequence[tuple[str, Sequence[str], Any, int]]],
    *,
    title: str,
    subtitle: str = "",
    left: int = 44,
    right: int = 40,
) -> go.Figure:
    """Contexts under one another, the token in question in the same column.

    The ground of a token is as strong as its activation, in shares of the largest in
    its section.

    Args:
        sections: heading -> (group, tokens as text, a value a token, place of the
            token in question), as `reading.snippets` gives them; groups together.
        left, right: characters before that token, and from it on; the rest is cut.
    """
    page, y = Page(), 0.0
    for heading, rows in sections.items():
        page.note(0, y, f"<b>{heading}</b>", "left")
        high = max((float(array(values).max()) for _, _, values, _ in rows), default=1)
        y, last = y + 1.1, None
        for group, tokens, values, place in rows:
            values = array(values)
            if group != last:
                y += 0.25 if last is not None else 0
                page.note(0, y, group, "left", font_size=11)
                last = group
            page.note(17.5, y, f"{values[place]:.2f}", "right", font_size=11)
            texts = [token.replace("\n", "⏎") for token in tokens]
            start = 19 + left - sum(map(len, texts[:place]))
            for text, value in zip(texts, values, strict=True):
                x, start = start, start + len(text)
                if x >= 19 and start <= 19 + left + right:
                    hover = f"{escaped(text)}: {value:.2f}"
                    share = float(value) / high if value > 0 else 0.0
                    page.word(x, y, text, share, hover)
            y += 1
        y += 0.9
    sizes = dict(columns=19 + left + right, lines=y, above=130)
    bar = dict(len=220, lenmode="pixels", y=1, yanchor="top")
    return page.figure(title, subtitle, **sizes, unit="of the largest", **bar)


def latent_profiles(
    profiles: Mapping[str, Mapping[str, Any]], *, title: str, subtitle: str = ""
) -> go.Figure:
    """A row of three panels a latent: tokens, positions, and effect on the logits.

    Args:
        profiles: heading -> {"tokens": frame with token, share, rows, fires (see
            `reading.by_token`), "positions": (start of each bin, share of rows),
            "logits": (tokens, effects), strongest promoted first, "by chance":
            (largest, smallest) effect of a random direction}.
    """
    n = len(profiles)
    names = ["fires on this share of a token", "fires at position", "adds to logits"]
    fig = make_subplots(
        n,
        3,
        subplot_titles=[
            f"{heading}: {name}" if i == 0 else name
            for heading in profiles
            for i, name in enumerate(names)
        ],
        horizontal_spacing=0.13,
        vertical_spacing=0.36 / (n + 1),
    )
    for row, profile in enumerate(profiles.values(), start=1):
        frame = profile["tokens"].iloc[::-1]
        fig.add_bar(
            x=100 * array(frame["share"]),
            y=[_quoted(token) for token in frame["token"]],
            orientation="h",
            marker_color=LINES[0],
            customdata=np.stack([frame["fires"], frame["rows"]], 1),
            hovertemplate="%{customdata[0]} of %{customdata[1]} rows<extra></extra>",
            row=row,
            col=1,
        )
        start, share = profile["positions"]
        fig.add_bar(
            x=[str(s) for s in array(start)],
            y=100 * array(share),
            marker_color=LINES[0],
            row=row,
            col=2,
        )
        tokens, effects = profile["logits"]
        effects = array(effects)[::-1]
        fig.add_bar(
            x=effects,
            y=[_quoted(token) for token in reversed(tokens)],
            orientation="h",
            marker_color=[LINES[2] if value >= 0 else LINES[1] for value in effects],
            row=row,
            col=3,
        )
        for chance in profile["by chance"]:
            fig.add_vline(x=chance, line=dict(color=NULL, dash="dot"), row=row, col=3)
        fig.update_xaxes(title_text="% of its rows", row=row, col=1)
        fig.update_xaxes(
            title_text="position, from", type="category", tickangle=0, row=row, col=2
        )
        fig.update_yaxes(title_text="% of rows", rangemode="tozero", row=row, col=2)
        fig.update_xaxes(title_text="logit", row=row, col=3)
        for col in (1, 3):
            fig.update_yaxes(
                type="category", tickfont=dict(color=INK, size=11), row=row, col=col
            )
    styled(fig, title, subtitle, width=960, height=110 + 290 * n)
    return panel_titles(fig, size=12).update_layout(showlegend=False)


def _quoted(token: str) -> str:
    return f"“{escaped(token.replace(chr(10), '⏎'))}”"


def concept_scores(
    frame: Any,
    columns: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    x: str,
    controls: Sequence[str] = (),
) -> go.Figure:
    """One line a "concept", a dot a column; controls are small and grey.

    Args:
        columns: of the frame; of these at most four controls.
    """
    fig = go.Figure()
    symbols = iter(("x-thin-open", "cross-thin-open", "line-ns-open", "circle-open"))
    for i, column in enumerate(columns):
        null = column in controls
        fig.add_scatter(
            x=array(frame[column]),
            y=list(frame["concept"]),
            name=column,
            mode="markers",
            marker=dict(
                color=NULL if null else LINES[i % len(LINES)],
                size=8 if null else 10,
                symbol=next(symbols)
                if null
                else ("circle", "diamond", "square")[i % 3],
                line_width=1.5 if null else 0,
            ),
        )
    fig.update_xaxes(rangemode="tozero", side="top")
    fig.update_yaxes(
        categoryorder="array",
        categoryarray=list(frame["concept"])[::-1],
        automargin=True,
        ticksuffix="  ",
        tickfont_size=11,
        dtick=1,
        range=[-0.7, len(frame) - 0.3],
    )
    height = 230 + 17 * len(frame)
    styled(fig, title, subtitle, x=x, height=height)
    fig.update_layout(
        legend=dict(orientation="h", x=0, y=0, yref="container", yanchor="bottom"),
        title=dict(y=1 - 20 / height, yanchor="top", yref="container"),
    )
    return fig.update_layout(margin=dict(t=130 if subtitle else 110, b=60))
