"""From the latents of a small SAE to those of a larger one: which became which.

A wider SAE on the same activations has more latents for the same things, and a latent
of the small one may come apart into several of the large one ("splitting"). Two ways
to say whose child a latent is, which need not agree:

    by direction   the small latent whose decoder row is nearest by cosine
    by firing      the small latent whose firing is raised most where the child fires

Everything works on sparse codes (`code`), never on tokens × d_sae.
Sources: Bricken et al., "Towards monosemanticity" (2023), for splitting; Leask et al.,
"Sparse autoencoders do not find canonical units of analysis" (2025), for comparing
SAEs of two sizes latent by latent (see `stitching`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from scipy import sparse
from torch import Tensor
from torch.nn.functional import normalize

from saeutils.sae import encode_sparse
from saeutils.streaming import (
    BUDGET,
    Rows,
    RunningMoments,
    checked_chunks,
    rows_within,
)


@dataclass(frozen=True, eq=False)
class Coded:
    """One SAE on some rows: its codes, sparse, and its decoder."""

    z: sparse.csr_array
    """Codes (rows, d_sae), float32; only what is not zero."""
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    @cached_property
    def fires(self) -> sparse.csr_array:
        """1 where a latent fires, (rows, d_sae)."""
        z = self.z
        ones = np.ones(z.nnz, np.float32)
        return sparse.csr_array((ones, z.indices, z.indptr), shape=z.shape)

    @cached_property
    def by_latent(self) -> sparse.csc_array:
        """The codes by column."""
        return self.z.tocsc()

    @cached_property
    def counts(self) -> Int64[Tensor, " d_sae"]:
        """On how many rows each latent fires."""
        counts = np.bincount(self.z.indices, minlength=self.z.shape[1])
        return torch.from_numpy(counts)

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a row."""
        return self.z.nnz / self.z.shape[0]

    def take(self, rows: slice | Bool[np.ndarray, " rows"]) -> "Coded":
        """The same SAE on some of the rows."""
        return Coded(self.z[rows], self.W_dec, self.b_dec)

    def fvu(self, rows: Rows) -> float:
        """Σ‖x − x̂‖² / Σ‖x − mean‖² on the rows that were coded."""
        total, error, start = RunningMoments(len(self.b_dec)), 0.0, 0
        size = rows_within(BUDGET, len(self.b_dec))
        for x in checked_chunks(rows, len(self.b_dec), size):
            part = slice(start, start := start + len(x))
            total.update(x)
            error += (x - self.decode(part)).double().square().sum().item()
        return error / total.scatter.sum().item()

    def decode(self, rows: slice) -> Float[Tensor, "part d_in"]:
        """x̂ of some rows."""
        return torch.from_numpy(self.z[rows] @ self.W_dec.numpy()) + self.b_dec


@torch.no_grad()
def code(sae: Any, rows: Rows, *, budget: int = BUDGET) -> Coded:
    """Codes of all rows under an SAE, held in memory where they are not zero.

    budget: bytes that the codes of one chunk may take before they are made sparse.

    Raises ValueError for no rows, rows of another width, NaN or Inf.
    """
    d_sae, d_in = sae.W_dec.shape
    parts = []
    for x in checked_chunks(rows, d_in, rows_within(budget, d_sae), sae.W_dec.device):
        chunk = encode_sparse(sae, x.to(sae.W_dec.dtype))
        arrays = (chunk.values, chunk.indices, chunk.indptr)
        part = tuple(a.numpy() for a in arrays)
        parts.append(sparse.csr_array(part, shape=(len(x), d_sae)))
    z = sparse.vstack(parts, format="csr")
    z.sum_duplicates()
    b_dec = getattr(sae, "b_dec", None)
    b_dec = torch.zeros(d_in) if b_dec is None else b_dec
    return Coded(z, sae.W_dec.detach().float().cpu(), b_dec.detach().float().cpu())


# ------------------------------------------------------------------ whose child


class Parents(NamedTuple):
    """For each latent of the large SAE one of the small."""

    parent: Int64[Tensor, " large"]
    """−1 for none: a latent that never fires, or never with any of the small."""
    score: Float[Tensor, " large"]
    """Cosine, or how much firing is raised; NaN for none."""


@torch.no_grad()
def parents_by_cosine(
    small: Float[Tensor, "m d_in"],
    large: Float[Tensor, "n d_in"],
    *,
    budget: int = BUDGET,
) -> Parents:
    """argmax_i cos(small_i, large_j) for each j, in blocks of `budget` bytes.

    Raises ValueError when one of them has no latents.
    """
    if len(small) == 0 or len(large) == 0:
        raise ValueError(f"nothing to compare: {len(small)} and {len(large)} latents")
    against = normalize(small, dim=1).T
    blocks = normalize(large, dim=1).split(rows_within(budget, len(small)))
    score, parent = zip(*((b @ against).max(1) for b in blocks), strict=True)
    return Parents(torch.cat(parent), torch.cat(score))


def parents_by_firing(small: Coded, large: Coded) -> Parents:
    """argmax_i P(i fires | j fires) − P(i fires | j does not), for each j.

    Both on the same rows. The difference is the slope of i's firing on j's: 1 for a
    parent that fires on all of j's rows and nowhere else, near 1 for a rare child of
    a rare parent, and 0 for a small latent that fires everywhere.

    Raises ValueError for codes of different rows.
    """
    n_rows = _same_rows(small, large)
    both = (small.fires.T @ large.fires).tocoo()
    p_small = small.counts.numpy() / n_rows
    n_large = large.counts.numpy()
    i, j = both.coords
    # (n_ij − p_i n_j) / (n_j (1 − n_j / n)); nothing is raised by what always fires.
    spread = n_large[j] * (1 - n_large[j] / n_rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (both.data - p_small[i] * n_large[j]) / spread
    slope[spread == 0] = 0
    parent = np.full(len(n_large), -1)
    score = np.full(len(n_large), np.nan, np.float32)
    order = np.lexsort((-i, slope, j))  # of equals the first small latent is last
    last = np.flatnonzero(np.diff(j[order], append=-1))
    best = order[last]
    best = best[slope[best] > 0]
    parent[j[best]], score[j[best]] = i[best], slope[best]
    return Parents(torch.from_numpy(parent), torch.from_numpy(score))


def shuffled(parents: Parents, *, seed: int = 0) -> Parents:
    """The same parents dealt at random to the children: a null for families."""
    order = torch.randperm(
        len(parents.parent), generator=torch.Generator().manual_seed(seed)
    )
    return Parents(*(part[order] for part in parents))


class Agreement(NamedTuple):
    """How often two ways of naming a parent name the same one."""

    share: float
    chance: float
    """What it would be if each kept how often it names a parent, and nothing else:
    Σ_i P(one names i) P(the other names i)."""
    n: int
    """Latents that have a parent by both."""


def agreement(
    one: Parents, other: Parents, among: Bool[Tensor, " large"] | None = None
) -> Agreement:
    """Share of latents (of those in `among`) whose two parents are the same."""
    both = (one.parent >= 0) & (other.parent >= 0)
    both = both if among is None else both & among
    a, b = one.parent[both], other.parent[both]
    if len(a) == 0:
        return Agreement(float("nan"), float("nan"), 0)
    m = int(torch.maximum(a.max(), b.max())) + 1
    p, q = (x.bincount(minlength=m).double() / len(a) for x in (a, b))
    return Agreement((a == b).double().mean().item(), (p @ q).item(), len(a))


class Kin(NamedTuple):
    """How the latents of one SAE stem from those of another."""

    by_cosine: Parents
    by_firing: Parents
    live: Bool[Tensor, " large"]
    """Latents that fire often enough to be judged."""
    nearest: Float[Tensor, " live"]
    """Largest cosine of each live latent with any of the small SAE."""
    rate: Float64[Tensor, " live"]
    """Share of the rows on which each live latent fires."""

    def agree(self, above: float, like: "Kin") -> dict[str, int | float]:
        """How many live latents are found again (nearest cosine above the bound), the
        same at the firing rates of another SAE (`at_rates`), and `agreement` of both
        parents, also for those found again and the others apart: a row of a table."""
        close, again = self.by_cosine.score > above, self.nearest > above
        every, found, new = (
            agreement(self.by_cosine, self.by_firing, self.live & part)
            for part in (torch.ones_like(close), close, ~close)
        )
        row = {"latents": every.n, "found again": again.double().mean().item()}
        row["at equal rates"] = at_rates(again, self.rate, like.rate)
        row |= {"same parent": every.share, "by chance": every.chance}
        return row | {"of those found": found.share, "of the others": new.share}


def kin(small: Coded, large: Coded, *, least: int = 10) -> Kin:
    """Parents by direction and by firing of the latents of `large` in `small`.

    least: rows on which a latent must fire to be judged.
    """
    by_cosine = parents_by_cosine(small.W_dec, large.W_dec)
    live = large.counts >= least
    rate = large.counts[live].double() / large.z.shape[0]
    by_firing = parents_by_firing(small, large)
    return Kin(by_cosine, by_firing, live, by_cosine.score[live], rate)


def at_rates(
    values: Shaped[Tensor, " n"],
    rate: Float64[Tensor, " n"],
    like: Float64[Tensor, " m"],
    *,
    bins: int = 10,
) -> float:
    """Mean of values of latents, weighted so that they fire as often as others do.

    Wider SAEs have rarer latents, and rare latents differ from frequent ones whatever
    the width. So within each tenth (of `bins`) of the others' firing rates the mean is
    taken for itself; then the mean over the bins in which there are latents.
    """
    inner = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    edges = torch.quantile(like.double(), inner)
    place, other = (torch.bucketize(r.double(), edges) for r in (rate, like))
    # Rarer or more frequent than any of the others: not comparable.
    inside = (rate >= like.min()) & (rate <= like.max())
    sums = torch.zeros(bins, dtype=torch.float64)
    sums.index_add_(0, place[inside], values[inside].double())
    n = place[inside].bincount(minlength=bins)
    weight = other.bincount(minlength=bins).double() * (n > 0)
    return ((sums / n.clamp(min=1)) @ weight / weight.sum()).item()


# ------------------------------------------------------------- what it stands for


class FiringScores(NamedTuple):
    """How well the firing of each latent tells each concept."""

    precision: Float[np.ndarray, "concepts d_sae"]
    recall: Float[np.ndarray, "concepts d_sae"]

    @property
    def f1(self) -> Float[np.ndarray, "concepts d_sae"]:
        total = np.maximum(self.precision + self.recall, 1e-12)
        return 2 * self.precision * self.recall / total


def firing_scores(
    coded: Coded, labels: Bool[np.ndarray, "rows concepts"]
) -> FiringScores:
    """Precision and recall of "latent fires" for "row carries the concept".

    0 where a latent never fires, or no row carries the concept. Whoever takes the best
    of many latents must score it on rows that it was not chosen on.

    Raises ValueError for labels of another number of rows.
    """
    if len(labels) != coded.z.shape[0]:
        raise ValueError(f"labels of {len(labels)} rows, codes of {coded.z.shape[0]}")
    carried = sparse.csr_array(labels.astype(np.float32))
    hits = (carried.T @ coded.fires).toarray()
    fired = coded.counts.numpy()
    return FiringScores(
        hits / np.maximum(fired, 1), hits / np.maximum(labels.sum(0), 1)[:, None]
    )


def main_latents(
    coded: Coded, label: Bool[np.ndarray, " rows"], *, most: int = 5, gain: float = 0.03
) -> list[int]:
    """The few latents that, fired by any of them, tell a concept best; best first.

    Taken one by one, each the one that raises the F1 of "any of them fires" most,
    until that is less than `gain`: how many a concept has been split into. (Chanin et
    al. 2024 add latents to a sparse probe by the same rule.)

    Raises ValueError when no row carries the concept.
    """
    total = int(label.sum())
    if not total:
        raise ValueError("no row carries the concept")
    chosen: list[int] = []
    found, best = np.zeros(len(label), bool), 0.0
    while len(chosen) < most:
        new = coded.fires.T @ (~found).astype(np.float32)
        hits = coded.fires.T @ (label & ~found).astype(np.float32)
        f1 = 2 * (hits + (label & found).sum()) / (new + found.sum() + total)
        latent = int(f1.argmax())
        if f1[latent] < best + gain:
            break
        chosen.append(latent)
        best = float(f1[latent])
        found |= coded.fires[:, [latent]].toarray()[:, 0] > 0
    return chosen


def _same_rows(small: Coded, large: Coded) -> int:
    n, m = small.z.shape[0], large.z.shape[0]
    if n != m:
        raise ValueError(f"codes of {n} and {m} rows: both SAEs must see the same rows")
    return n
