"""Cards of latents as a page beside the report, and the links that lead to them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saeutils import plots
from saeutils.report.pages import anchor, write_figures


def write_cards(
    path: str | Path, cards: Sequence[Any], groups: Mapping[str, Sequence[int]]
) -> str:
    """Write `plots.feature_card` of each card to one page; Markdown with links to it.

    Args:
        path: of the page, relative to the folder the notebook runs in, so that the
            links hold in Jupyter; the notebook's report leads them to where it ran.
        groups: heading -> latents, in the order in which to link them.

    Raises:
        ValueError: a latent in `groups` that has no card.
    """
    figures = {f"latent {card.latent}": plots.feature_card(card) for card in cards}
    wanted = [f"latent {i}" for latents in groups.values() for i in latents]
    if missing := [name for name in wanted if name not in figures]:
        raise ValueError(f"no card of {', '.join(missing)}")
    write_figures(path, f"Latents of {cards[0].hook}, one a card", figures)
    lines = []
    for heading, latents in groups.items():
        links = [f"[{i}]({path}#{anchor(f'latent {i}')})" for i in latents]
        lines.append(f"**{heading}:** {' · '.join(links) or 'none'}")
    return "\n\n".join(lines)
