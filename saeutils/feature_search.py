"""Latents that fire on some texts and are silent on others.

    found = find_latents(model, hook, sae, ["She was «sad».", …], ["She was «big».", …])
    found.table, found.left, found.by_chance

First a filter (fires on the positive texts, not on the negative ones), then a rank.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from saeutils.metrics import Autoencoder
from saeutils.models import activations_at
from saeutils.sae import encode_sparse
from saeutils.stories import StoryData, tokens

if TYPE_CHECKING:
    import pandas as pd

_MARKED = re.compile("«(.+?)»", re.DOTALL)


class Found(NamedTuple):
    """What a search leaves, best first; the table may be empty."""

    table: "pd.DataFrame"
    """latent, score, and by side the share of texts it fires on and its mean
    activation (0 where it is silent)."""
    left: dict[str, int]
    """Latents after each step."""
    by_chance: float
    """Latents that pass the same filter when the texts are dealt to the two sides at
    random, on average; NaN without negative texts, as the next two."""
    score_by_chance: float
    """Best score then, on average (0 where none passes)."""
    p: float
    """(1 + deals whose best score is no worse than this one's) / (1 + deals); 1 where
    nothing was found."""


def find_latents(
    model: nn.Module,
    hook: str,
    sae: Autoencoder,
    positive: Sequence[str],
    negative: Sequence[str] = (),
    *,
    least: int | float = 1.0,
    most: int | float = 0.0,
    n: int = 10,
    shuffles: int = 100,
    seed: int = 0,
) -> Found:
    """The latents that fire on the positive texts and not on the negative ones.

    A latent's activation on a text is its largest on any token, or on those that touch
    what stands between « and », where there is such a mark; the marks are taken out.
    The score is the mean over positive texts less the mean over negative ones, in
    units of activations (times the length of the decoder row).

    Args:
        least, most: share of the positive texts on which a latent must fire, and of
            the negative ones on which it may.
        n: rows of the table at most.
        shuffles: deals of the texts to the two sides, at least 1.

    Raises ValueError without a positive text, for an empty text or mark, a text or
    mark beyond the context, shares beyond [0, 1].
    """
    import pandas as pd

    if isinstance(positive, str) or isinstance(negative, str) or not len(positive):
        raise ValueError("no positive text: give lists of texts, at least one positive")
    positive, negative = list(positive), list(negative)
    if not 0 <= least <= 1 or not 0 <= most <= 1 or shuffles < 1:
        raise ValueError(
            f"least {least} and most {most} are shares, in [0, 1]; shuffles {shuffles} "
            "at least 1"
        )
    strongest = text_activations(model, hook, sae, positive + negative)
    side = np.arange(len(strongest)) < len(positive)

    def passing(side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        fires = strongest > 0
        fired = (fires[side].mean(0) >= least) & fires[side].any(0)
        return fired, fired & (fires[~side].sum(0) <= most * (~side).sum())

    def means(side: np.ndarray) -> list[np.ndarray]:
        return [strongest[s].sum(0) / max(1, s.sum()) for s in (side, ~side)]

    def best(side: np.ndarray, kept: np.ndarray) -> float:
        above, below = means(side)
        return float((above - below)[kept].max(initial=0))

    fired, kept = passing(side)
    left = {"latents": strongest.shape[1], "fire on the positive": int(fired.sum())}
    left["silent on the negative"] = int(kept.sum())
    chance = by_chance = p = float("nan")
    if negative:
        rng = np.random.default_rng(seed)
        dealt = [rng.permutation(side) for _ in range(shuffles)]
        passed = [passing(one)[1] for one in dealt]
        tops = np.array([best(*one) for one in zip(dealt, passed, strict=True)])
        chance, by_chance = (
            float(np.mean([x.sum() for x in passed])),
            float(tops.mean()),
        )
        no_worse = (tops >= best(side, kept)).sum() if kept.any() else shuffles
        p = float((1 + no_worse) / (1 + shuffles))
    columns: dict[str, Any] = {"latent": np.arange(strongest.shape[1])}
    fires = strongest > 0
    columns["fires, positive"] = fires[side].mean(0)
    columns["fires, negative"] = fires[~side].sum(0) / max(1, len(negative))
    columns["mean, positive"], columns["mean, negative"] = means(side)
    columns["score"] = columns["mean, positive"] - columns["mean, negative"]
    frame = pd.DataFrame(columns)[kept]
    frame = frame.sort_values(["score", "latent"], ascending=[False, True])
    frame = frame.head(n).reset_index(drop=True)
    return Found(frame, left, chance, by_chance, p)


def text_activations(
    model: nn.Module, hook: str, sae: Autoencoder, texts: Sequence[str]
) -> Float[np.ndarray, "texts d_sae"]:
    """Each latent's largest activation on each text (see `find_latents`)."""
    plain, marks = zip(*map(_unmarked, texts), strict=True)
    tokenizer, context = model.tokenizer, model.cfg.n_ctx
    coded = tokenizer(list(plain), add_special_tokens=False)["input_ids"]
    longest = max(map(len, coded)) + 1
    if longest > context:
        raise ValueError(f"a text of {longest} tokens: the model sees {context}")
    data = StoryData(list(plain), np.arange(len(plain)), "test", "search")
    rows = tokens(data, tokenizer, max(longest, 2))
    ids = torch.from_numpy(rows.ids)
    acts = activations_at(model, hook, (ids, ids), batch_size=64)
    out = np.zeros((len(texts), len(sae.W_dec)), np.float32)
    length = sae.W_dec.detach().norm(dim=1).cpu().numpy()
    for text, (spans, mine, x) in enumerate(zip(rows.spans, marks, acts, strict=True)):
        asked = [
            place
            for place, (a, b) in enumerate(spans)
            if b > a and any(a < stop and b > start for start, stop in mine)
        ]
        z = encode_sparse(sae, x[asked].to(sae.W_dec))
        np.maximum.at(out[text], z.indices.numpy(), z.values.numpy())
    return out * length


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and what they enclosed; all of it without marks."""
    plain, spans, last = "", [], 0
    for found in _MARKED.finditer(text):
        plain += text[last : found.start()]
        spans.append((len(plain), len(plain) + len(found[1])))
        plain, last = plain + found[1], found.end()
    plain += text[last:]
    if not plain.strip() or any(mark in plain for mark in "«»"):
        raise ValueError(f"{text!r}: a text has letters, and marks in pairs, «so»")
    if any(not plain[start:stop].strip() for start, stop in spans):
        raise ValueError(f"{text!r}: nothing but blanks between « and »")
    return plain, spans or [(0, len(plain))]
