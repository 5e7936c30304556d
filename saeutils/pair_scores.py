"""How alike two models are, by the scores in use: short, for what fits in memory.

    a, b = View(rows, codes, W_dec), View(...)      # the same inputs, in one order
    pair_scores(a, b), null_scores(a, b)            # -> PairScores, and ten of chance

To calibrate the scores where the answer is known. All is dense: streaming versions,
for latents and rows by the million, are another job.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saeutils.recovery import unit

VARIANCE = 0.99  # kept by SVCCA's principal components
RSA_ROWS = 500  # rows compared with each other: all pairs of them are held


class View(NamedTuple):
    """A model: its activations, codes of them, and the decoder of these codes."""

    rows: Float[Tensor, "n d"]
    codes: Float[Tensor, "n m"]
    W_dec: Float[Tensor, "m d"]


class PairScores(NamedTuple):
    """1 for one and the same model. C: correlations of the two models' codes."""

    mean_max_ab: float
    """Mean over latents i of a of max_j C_ij."""
    mean_max_ba: float
    cosine_ab: float
    """The same of the cosines of decoder rows. NaN for models of different d."""
    cosine_ba: float
    mutual: float
    """Mutual nearest neighbours in C, of the latents of the model that has fewer."""
    hungarian: float
    """Mean C_ij of the one-to-one matching of largest sum."""
    svcca: float
    """Of the rows. NaN where `svcca` refuses."""
    rsa: float
    svcca_matched: float
    """Of the decoder rows of the pairs that the Hungarian matching makes."""
    rsa_matched: float
    latents: tuple[int, int]
    """Latents compared: those whose codes are not constant."""


def pair_scores(a: View, b: View) -> PairScores:
    """All scores. Raises ValueError for views of different rows."""
    counts = [len(x) for x in (a.rows, a.codes, b.rows, b.codes)]
    if len({*counts}) > 1:
        raise ValueError(f"rows and codes of a and b: {counts}; give the same inputs")
    alive = [v.codes.amax(0) > v.codes.amin(0) for v in (a, b)]
    W_a, W_b = a.W_dec[alive[0]], b.W_dec[alive[1]]
    c = correlations(a.codes[:, alive[0]], b.codes[:, alive[1]])
    same_d = W_a.shape[1] == W_b.shape[1]
    cosine = unit(W_a) @ unit(W_b).T if same_d else torch.full_like(c, torch.nan)
    i, j = hungarian(c)
    return PairScores(
        *(mean_max(c), mean_max(c.T), mean_max(cosine), mean_max(cosine.T)),
        *(mutual(c), c[i, j].mean().item()),
        *(_svcca_or_nan(a.rows, b.rows), rsa(a.rows, b.rows)),
        *(_svcca_or_nan(W_a[i], W_b[j]), rsa(W_a[i], W_b[j])),
        latents=(len(W_a), len(W_b)),
    )


def null_scores(a: View, b: View, times: int = 10, seed: int = 0) -> list[PairScores]:
    """`pair_scores` with b's rows permuted and its decoder turned at random.
    The matching is made anew: pairs are selected in the null as in the score."""
    generator, d = torch.Generator().manual_seed(seed), b.W_dec.shape[1]
    out = []
    for _ in range(times):
        order = torch.randperm(len(b.rows), generator=generator)
        turn = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
        out.append(pair_scores(a, View(b.rows[order], b.codes[order], b.W_dec @ turn)))
    return out


def correlations(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"]) -> Tensor:
    """Pearson's, of columns of x with columns of y, (p, q); 0 for constant columns."""
    x, y = (z - z.mean(0, dtype=torch.float64).float() for z in (x, y))
    x, y = (z / z.norm(dim=0).clamp_min(1e-12) for z in (x, y))
    return x.T @ y


def mean_max(c: Float[Tensor, "p q"]) -> float:
    """Mean over rows of the largest entry. Not symmetric: take c.T as well."""
    return c.amax(1).mean().item()


def mutual(c: Float[Tensor, "p q"]) -> float:
    """Pairs with c_ij the largest of its row and its column / min(p, q).
    By chance there are p q / (p + q − 1): half of the latents, for p = q."""
    back = c.argmax(0)[c.argmax(1)]
    return (back == torch.arange(len(c))).sum().item() / min(c.shape)


def hungarian(c: Float[Tensor, "p q"]) -> tuple[Tensor, Tensor]:
    """Rows and columns of the min(p, q) one-to-one pairs with the largest sum."""
    from scipy.optimize import linear_sum_assignment

    i, j = linear_sum_assignment(c.numpy(), maximize=True)
    return torch.from_numpy(i), torch.from_numpy(j)


def svcca(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"]) -> float:
    """Mean canonical correlation of the principal components that hold 99 %.
    Of independent data about √(d / n), not 0. Source: Raghu et al. (2017).
    Raises: ValueError when n ≤ the components of both: their spaces then meet, and
        correlations of 1 are found between anything.
    """
    u_x, u_y = _components(x), _components(y)
    kept = u_x.shape[1], u_y.shape[1]
    if len(x) <= sum(kept):
        raise ValueError(
            f"svcca of {len(x)} rows in {kept} dimensions is near 1 whatever they are: "
            f"give it more than {sum(kept)} rows"
        )
    return torch.linalg.svdvals(u_x.T @ u_y).clamp(0, 1).mean().item()


def rsa(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"]) -> float:
    """Spearman's correlation of the distances between the first `RSA_ROWS` rows.
    Source: Kriegeskorte, Mur and Bandettini (2008), with Euclidean distances."""
    from scipy.spatial.distance import pdist
    from scipy.stats import rankdata

    ranks = [rankdata(pdist(z[:RSA_ROWS].double().numpy())) for z in (x, y)]
    return float(np.corrcoef(ranks)[0, 1])


def _components(x: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum()
    return u[:, : int((share < VARIANCE).sum()) + 1]


def _svcca_or_nan(x: Tensor, y: Tensor) -> float:
    try:
        return svcca(x, y)
    except ValueError:
        return float("nan")
