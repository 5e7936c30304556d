"""Words on grounds of colour, as in a page: what figures of text are made of."""

from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from saeutils.plots.style import colour_bar, styled

GROUND = ["#FFFFFF", "#FDD49E", "#EF6548"]  # of a word, by its value
CHARACTER, LINE = 7.9, 21  # pixels of a monospaced character of 13 pixels


class Page:
    """A figure of words; x counts characters, y lines from the top."""

    def __init__(self) -> None:
        self.fig = go.Figure()
        self._words: list[tuple[int | float, int | float, str, str]] = []

    def note(
        self, x: int | float, y: int | float, text: str, anchor: str, **font: Any
    ) -> None:
        """A heading, or what stands beside the words."""
        self.fig.add_annotation(
            x=x, y=y, text=text, showarrow=False, xanchor=anchor, **font
        )

    def word(
        self,
        x: int | float,
        y: int | float,
        text: str,
        share: int | float,
        hover: str,
    ) -> None:
        """A word on a ground as strong as `share`, from 0 or NaN (none) to 1."""
        if share > 0:
            self.fig.add_shape(
                type="rect",
                x0=x,
                x1=x + len(text),
                y0=y - 0.45,
                y1=y + 0.45,
                fillcolor=sample_colorscale(GROUND, min(float(share), 1.0))[0],
                line_width=0,
                layer="below",
            )
        self._words.append((x, y, escaped(text), hover))

    def figure(
        self,
        title: str,
        subtitle: str,
        *,
        columns: int,
        lines: int | float,
        above: int,
        unit: str,
        high: int | float = 1,
        **bar: Any,
    ) -> go.Figure:
        """The finished page: so many characters wide, `above` pixels over its lines.

        The colour bar goes from 0 to `high` in this unit. Raises ValueError for a page
        without a word.
        """
        if not self._words:
            raise ValueError("no word to draw: were all texts empty?")
        fig = self.fig
        xs, ys, shown, hovers = map(list, zip(*self._words, strict=True))
        fig.add_scatter(
            x=xs,
            y=ys,
            mode="text",
            text=shown,
            textposition="middle right",
            textfont=dict(family="DejaVu Sans Mono, Courier New, monospace", size=13),
            hovertext=hovers,
            hoverinfo="text",
            showlegend=False,
        )
        fig.add_scatter(  # carries the colour bar
            x=[None],
            y=[None],
            mode="markers",
            marker=dict(
                colorscale=GROUND,
                cmin=0,
                cmax=high,
                color=[0],
                colorbar=colour_bar(unit, **bar),
                showscale=True,
            ),
            showlegend=False,
        )
        width, height = int(150 + CHARACTER * columns), int(above + LINE * lines)
        styled(fig, title, subtitle, width=width, height=height)
        fig.update_xaxes(visible=False, range=[-0.5, columns + 1])
        fig.update_yaxes(visible=False, range=[lines - 0.6, -0.8])
        return fig.update_layout(margin=dict(l=20, b=15))


def escaped(text: str) -> str:
    """As plotly shows it: its mark-up off, blanks at the ends kept."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace(" ", "\u00a0")
