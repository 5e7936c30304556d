"""Absorption: taking absorbed atoms apart, and measuring it where labels are known.

`take_apart` is a rule that never looks at a ground truth; `absorption` needs labels.

Where feature c fires only together with its parent p, one atom along p + c explains
as much as two along p and c, with fewer codes: sparsity itself asks for the merger
("absorption"). What gives it away is that p and c have magnitudes of their own. On
nearly every row where the merged atom fires, the best SIGNED amount of the parent's
atom to add is not zero, on either side. An atom that merely lies close to another has
some of that to add only where the other feature happens to fire as well.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy import sparse
from torch import Tensor

from saeutils.sparse_coding import SparseCodes


def chance_cosine(m: int, d: int) -> float:
    """The cosine that one pair among m random directions in d dimensions exceeds, on
    average: solves m (m − 1) / 2 · P(cos > c) = 1.

    (1 + cos) / 2 of random directions is Beta((d − 1)/2, (d − 1)/2).
    """
    from scipy.stats import beta

    tail = min(0.5, 2 / max(m * (m - 1), 1))
    return float(2 * beta.isf(tail, (d - 1) / 2, (d - 1) / 2) - 1)


@torch.no_grad()
def take_apart(
    W: Float[Tensor, "m d"],
    codes: SparseCodes,
    left: Float[Tensor, "rows d"],
    *,
    least: int | float,
    above: float | None = None,
    share: float = 0.5,
    fewest: int = 20,
) -> tuple[Float[Tensor, "m d"], int]:
    """Projects the more frequent atom i out of the rarer j where j has absorbed i.

    That is, where cos(i, j) exceeds `above` and, on more than `share` of the rows on
    which j fires, |α| > `least` for (α, β) = argmin ‖r − α W_i − β W_j‖², r being the
    row without the other atoms' parts. Each j loses one i a call, the nearest.

    Args:
        left: rows − b − codes · W.
        least: in the units of the codes, and never taken less than 2.5 times the root
            mean square of `left`'s coordinates: noise is no absorption.
        above: default `chance_cosine(m, d)`: closer than random directions get.
        fewest: rows on which j must fire to be judged.

    Returns: the dictionary, and how many atoms were changed.
    """
    m, d = W.shape
    above = chance_cosine(m, d) if above is None else above
    on = codes.value > 0
    used = codes.index[on].bincount(minlength=m)
    least = max(float(least), 2.5 * left.square().mean().sqrt().item())
    cosine = W @ W.T
    rarer = used[:, None] <= used
    cosine = cosine.masked_fill(rarer | (used < fewest)[None, :], -1)
    # Now cosine[i, j] > −1 only where i is the more frequent and j can be judged.
    nearest = cosine.amax(0)
    out, changed = W.clone(), 0
    rows, places = on.nonzero(as_tuple=True)
    atoms = codes.index[rows, places]
    by_atom = atoms.argsort(stable=True)
    starts = torch.cat([used.new_zeros(1), used.cumsum(0)])
    for j in (nearest > above).nonzero().flatten().tolist():
        mine = by_atom[starts[j] : starts[j + 1]][:2000]
        r = left[rows[mine]]
        z_j = codes.value[rows[mine], places[mine]]
        for i in cosine[:, j].argsort(descending=True)[:3].tolist():
            c = cosine[i, j].item()
            if c <= above:
                break
            z_i = (codes.value[rows[mine]] * (codes.index[rows[mine]] == i)).sum(1)
            # Correlations of r = left + z_i W_i + z_j W_j with both, then 2 × 2.
            a = r @ W[i] + z_i + c * z_j
            b = r @ W[j] + c * z_i + z_j
            alpha = (a - c * b) / (1 - c * c)
            if (alpha.abs() > least).double().mean() > share:
                new = out[j] - (out[j] @ W[i]) * W[i]
                if new.norm() > 0.1:
                    out[j] = new / new.norm()
                    changed += 1
                break
    return out, changed


# ------------------------------------------------------- measured, with labels


class Probe(NamedTuple):
    """The concept is there where x · w + b > 0."""

    w: Float[Tensor, " d_in"]
    b: float

    def finds(self, x: Float[Tensor, "rows d_in"]) -> Bool[np.ndarray, " rows"]:
        return (x @ self.w + self.b > 0).numpy()


def concept_probe(
    x: Float[Tensor, "rows d_in"], label: Bool[np.ndarray, " rows"], *, C: float = 1.0
) -> Probe:
    """Class-balanced logistic regression on rows divided by their root mean square.

    Raises ValueError when all rows, or none, carry the concept.
    """
    from sklearn.linear_model import LogisticRegression

    if len(x) != len(label) or not 0 < label.sum() < len(label):
        raise ValueError(
            f"{len(x)} rows, {len(label)} labels, {int(label.sum())} of them true: a "
            "probe needs rows with the concept and rows without"
        )
    scale = x.square().mean().sqrt().clamp_min(1e-12).item()
    fit = LogisticRegression(C=C, class_weight="balanced", tol=1e-3, max_iter=300)
    fit.fit((x / scale).numpy(), label)
    w = torch.from_numpy(fit.coef_[0] / scale).to(x)
    return Probe(w, float(fit.intercept_[0]))


class Absorption(NamedTuple):
    """How often a concept is carried by a latent that is not one of its own."""

    rate: float
    """Share of the judged rows; NaN without any."""
    silent: float
    """Share of the judged rows on which none of the concept's own latents fires."""
    n: int
    """Rows judged."""
    rows: Int64[np.ndarray, " absorbed"]
    """The rows on which it was absorbed …"""
    latents: Int64[np.ndarray, " absorbed"]
    """… and by which latent."""


def absorption(
    z: sparse.csr_array,
    W_dec: Float[Tensor, "d_sae d_in"],
    probe: Probe,
    judged: Bool[np.ndarray, " rows"],
    main: Sequence[int],
    *,
    above: float | None = None,
    least: float = 0.4,
) -> Absorption:
    """On which rows some other latent stands in for the concept's own.

    That is, where none of the `main` latents fires, and one other gives more than
    `least` of the evidence for the concept, Σ_j max(0, z_j d_j · w), while its
    direction has a cosine above `above` with the probe's.

    After Chanin et al., "A is for absorption" (2024), with two differences: a share of
    the evidence in place of a margin of 1 in ablation effect, which depends on the
    scale of the probe (SAEBench, 2025, takes a share of 0.4, too), and a bound on the
    cosine that chance does not reach, in place of 0.025 (random directions in 192
    dimensions have 0.06 on average).

    High is not bad by itself: where a concept has no latent of its own, other latents
    carry it as well. Read it beside the recall of `main`, the rate for
    `matched_words`, and the rate with the rows of W_dec shuffled.

    Args:
        z: sparse codes, (rows, d_sae).
        judged: rows that carry the concept, and where the probe finds it.
        main: the concept's own latents (`splitting.main_latents`).
        above: default: the cosine that one of d_sae random directions exceeds.

    Raises ValueError for codes, decoder and rows that do not fit each other.
    """
    if z.shape != (len(judged), len(W_dec)) or len(probe.w) != W_dec.shape[1]:
        raise ValueError(
            f"codes {z.shape}, decoder {tuple(W_dec.shape)}, probe {len(probe.w)}, "
            f"{len(judged)} rows: these do not belong together"
        )
    along = (W_dec @ probe.w).numpy()
    length = (W_dec.norm(dim=1) * probe.w.norm()).clamp_min(1e-12).numpy()
    own = np.zeros(len(W_dec), bool)
    own[list(main)] = True
    where = np.flatnonzero(judged)
    part = z[where]
    row = np.repeat(np.arange(len(where)), np.diff(part.indptr))
    speaks = np.bincount(row, own[part.indices], minlength=len(where)) > 0
    evidence = np.maximum(part.data * along[part.indices], 0)
    total = np.bincount(row, evidence, minlength=len(where))
    if above is None:
        above = _one_of(len(W_dec), W_dec.shape[1])
    one = (evidence > least * total[row]) & (along / length > above)[part.indices]
    one &= ~speaks[row]
    first = np.unique(row[one], return_index=True)[1]  # two may pass where least < 0.5
    rows, latents = row[one][first], part.indices[one][first]
    share = (len(rows) / len(where), float(1 - speaks.mean())) if len(where) else ()
    rate, silent = share or (float("nan"),) * 2
    return Absorption(
        rate, silent, len(where), where[rows].astype(np.int64), latents.astype(np.int64)
    )


def _one_of(m: int, d: int) -> float:
    """The cosine that one of m random directions in d dimensions exceeds, on average,
    with a given one."""
    from scipy.stats import beta

    return float(2 * beta.isf(min(0.5, 1 / m), (d - 1) / 2, (d - 1) / 2) - 1)


def matched_words(
    tokens: Int64[np.ndarray, " rows"],
    label: Bool[np.ndarray, " rows"],
    *,
    seed: int = 0,
) -> Bool[np.ndarray, " rows"]:
    """A null for a concept: as many tokens, as frequent, with nothing in common.

    Each kind of token that carries the concept on most of its rows gets a partner that
    never carries it, drawn from the ten nearest in number of rows.

    Raises ValueError when there are fewer kinds without the concept than with it.
    """
    kinds, place, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    carried = np.bincount(place, label, minlength=len(kinds))
    mine = np.flatnonzero(carried > counts / 2)
    free = list(np.flatnonzero(carried == 0))
    if len(free) < len(mine):
        raise ValueError(
            f"{len(mine)} kinds of token carry the concept, {len(free)} never do: "
            "not enough to draw partners from"
        )
    rng = np.random.default_rng(seed)
    drawn = []
    for kind in mine[np.argsort(-counts[mine], kind="stable")]:
        gap = np.abs(np.log(counts[free] / counts[kind]))
        drawn.append(free.pop(int(rng.choice(np.argsort(gap, kind="stable")[:10]))))
    return np.isin(place, drawn)
