"""Is a latent about the token it stands on, or about more? All latents at once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor

from saeutils.context import token_texts
from saeutils.examples import Codes, top_examples
from saeutils.metrics import Autoencoder
from saeutils.store import as_store
from saeutils.streaming import BUDGET, Rows, RunningMoments, rows_within

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_array


class TokenScores(NamedTuple):
    """How much of each latent the token under it explains; NaN where it never fires."""

    firings: Int64[Tensor, " d_sae"]
    """Rows on which it fires."""
    top_token: Int64[Tensor, " d_sae"]
    """The token on which it fires most often (the first of equals); −1 if never."""
    top_share: Float64[Tensor, " d_sae"]
    """Share of its firings that are on that token."""
    explained: Float64[Tensor, " d_sae"]
    """Share of its variance over rows that lies between tokens:

        ε² = 1 − (SS_within / (n − K)) / (SS_total / (n − 1)),   K kinds of token.

    1: the token alone decides; 0 on average for shuffled tokens (so it can fall below),
    which the plain η² is not. Source: Kelley, 1935."""


def token_scores(codes: Codes, tokens: Int[Tensor, " n"]) -> TokenScores:
    """Scores of all latents in one pass over the codes.

    Args:
        tokens: of each row, from the provenance of the store.

    Memory: one number for each pair of a latent and a token on which it fires.

    Raises ValueError for tokens of other rows, or fewer than two rows a kind of token
    on average (then the token explains nearly anything).
    """
    if len(tokens) != codes.n_rows:
        raise ValueError(f"{len(tokens)} tokens for {codes.n_rows} rows of codes")
    kinds, token = np.unique(tokens.numpy(), return_inverse=True)
    n, n_kinds = len(token), len(kinds)
    if n < 2 * n_kinds:
        raise ValueError(
            f"{n} rows with {n_kinds} kinds of token: expected two a kind, or more text"
        )
    size = np.bincount(token)
    shape = (codes.d_sae, n_kinds)
    sums, counts = _zeros(shape), _zeros(shape)
    total, square = np.zeros(codes.d_sae), np.zeros(codes.d_sae)
    for row, latent, value in codes:
        place = latent.numpy(), token[row.numpy()]
        value = value.double().numpy()
        sums = sums + _summed(value, place, shape)
        counts = counts + _summed(np.ones_like(value), place, shape)
        total += np.bincount(place[0], value, codes.d_sae)
        square += np.bincount(place[0], value**2, codes.d_sae)
    centre = total**2 / n
    between = sums.power(2) @ (1 / size) - centre
    all_in_all = square - centre
    varies = all_in_all > 1e-9 * square  # what is constant has nothing to explain
    with np.errstate(invalid="ignore", divide="ignore"):
        within = (all_in_all - between) / (n - n_kinds)
        explained = np.where(varies, 1 - within / (all_in_all / (n - 1)), np.nan)
        firings = np.asarray(counts.sum(1)).ravel()
        best = np.asarray(counts.max(1).toarray()).ravel()
        top_share = best / firings
    top = np.where(firings > 0, kinds[np.asarray(counts.argmax(1)).ravel()], -1)
    return TokenScores(
        torch.from_numpy(firings.astype(np.int64)),
        torch.from_numpy(top.astype(np.int64)),
        torch.from_numpy(top_share),
        torch.from_numpy(explained),
    )


def _zeros(shape: tuple[int, int]) -> "csr_array":
    from scipy.sparse import csr_array

    return csr_array(shape)


def _summed(
    value: np.ndarray, place: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]
) -> "csr_array":
    from scipy.sparse import coo_array

    return coo_array((value, place), shape).tocsr()


def same_token(
    codes: Codes, tokens: Int[Tensor, " n"], n: int = 10
) -> Float64[Tensor, " d_sae"]:
    """Of the n stories in which a latent is strongest, the share with one same token.

    In each the token at its strongest row counts; the commonest of these is the same
    one. 1/n when all differ, NaN for a latent that fires in fewer than n stories.
    """
    if len(tokens) != codes.n_rows:
        raise ValueError(f"{len(tokens)} tokens for {codes.n_rows} rows of codes")
    share = torch.full((codes.d_sae,), torch.nan, dtype=torch.float64)
    for found in top_examples(codes, n):
        if len(found.rows) == n:
            _, counts = tokens[found.rows].unique(return_counts=True)
            share[found.latent] = counts.max() / n
    return share


def error_by_group(
    sae: Autoencoder, rows: Rows, groups: Int[Tensor, " n"], *, budget: int = BUDGET
) -> "pd.DataFrame":
    """Where an SAE fails: one line a group of rows, in rising order of the groups.

    Columns: group, rows, L0, FVU (squared error of its rows over their scatter around
    the mean of ALL rows, so that groups compare), share of error (of all of it).

    Raises ValueError for another number of groups than rows, or negative ones.
    """
    import pandas as pd

    store = as_store(rows)
    if len(groups) != len(store) or groups.min() < 0:
        raise ValueError(
            f"{len(groups)} groups from {int(groups.min())} for {len(store)} rows: "
            "expected one a row, 0 or more"
        )
    size, widest = rows_within(budget, max(sae.W_dec.shape)), int(groups.max()) + 1
    moments = RunningMoments(store.d_in)
    for batch in store.chunks(size):
        moments.update(batch.rows)
    sums = torch.zeros(3, widest, dtype=torch.float64)
    for batch in store.chunks(size):
        x, group = batch.rows, groups[batch.index]
        with torch.no_grad():
            z = sae.encode(x.to(sae.W_dec.device))
            error = (x - sae.decode(z).cpu()).double().square().sum(1)
            z = z.cpu()
        scatter = (x.double() - moments.mean).square().sum(1)
        for total, value in zip(sums, (error, scatter, (z != 0).sum(1)), strict=True):
            total += group.bincount(value.double(), widest)
    count = groups.bincount(minlength=widest)
    error, scatter, active = sums
    frame = {
        "group": torch.arange(widest),
        "rows": count,
        "L0": active / count,
        "FVU": error / scatter,
        "share of error": error / error.sum(),
    }
    kept = (count > 0).numpy()
    return pd.DataFrame({name: value.numpy()[kept] for name, value in frame.items()})


def in_context(
    codes: Codes,
    latents: Sequence[int],
    tokenizer: Any,
    *,
    n: int = 2,
    before: int = 12,
    after: int = 5,
) -> dict[str, tuple[list[str], np.ndarray]]:
    """The text around the strongest rows of latents, as `plots.highlighted` takes it.

    Returns: "latent 7, story 12" -> tokens as text, activation on each; the n strongest
    stories of each latent. Latents that never fire are left out.
    """
    top, texts = top_examples(codes, n, latents=latents), {}
    for latent in latents:
        for row in top[latent].rows.tolist():
            near = codes.store.context(row, before, after)
            first = row - near.place
            x = codes.store[first : first + len(near.tokens)]
            with torch.no_grad():
                sae = codes.sae
                z = x if sae is None else sae.encode(x.to(sae.W_dec.device)).cpu()
            name = f"latent {latent}, story {near.record['id']}"
            words = token_texts(tokenizer, near.tokens)
            texts[name] = words, z[:, latent].numpy()
    return texts
