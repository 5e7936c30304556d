"""Did it find the true features? Measures that reconstruction cannot stand in for.

    recovery(sae, truth)                    # -> Recovery, all of the measures
    table({"TopK": sae, ...}, truth)        # a row each, with oracles and a null

What is scored: an SAE, anything with `encode`, `decode`, `W_dec`, or a tensor (m, d),
of which only the directions are scored. Cosines are signed: a latent that points the
other way is not the feature. Where codes take both signs (ICA, PCA), they are |cos|.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saeutils.baselines import Dictionary
from saeutils.firing_scores import FiringCounts, FiringScores
from saeutils.metrics import Autoencoder, summary
from saeutils.streaming import RunningMoments
from saeutils.synthetic import Synthetic

if TYPE_CHECKING:
    import pandas as pd

FOUND, WELL_FOUND = 0.9, 0.95  # cosines


@dataclass(frozen=True, eq=False)
class Recovery:
    """What of the truth was found. `per feature` tensors are in the truth's order.

    Matching: each true feature has at most one latent and each latent at most one
    feature, so that the sum of cosines is largest (Hungarian). A latent cannot serve
    two features. Features beyond the number of latents have match −1, cosine 0.
    """

    name: str
    rates: Float[Tensor, " n"]
    """Of the true features."""
    match: Int64[Tensor, " n"]
    """Latent of each feature."""
    cosine: Float[Tensor, " n"]
    """cos(W_dec[match_i], W_i)."""
    nearest_other: Float[Tensor, " n"]
    """max_{j≠i} cos(W_j, W_i): what a wrong feature would score."""
    mmcs: float
    """Mean over features of the largest cosine with any latent."""
    mmcs_latents: float
    """Mean over latents of the largest cosine with any feature."""
    mcc: float
    """Mean |cosine| of the one-to-one matching by |cosine| over min(m, n) pairs: what
    sae_lens calls mean correlation coefficient."""
    uniqueness: float
    """Different best features of the latents (by |cos|) / number of latents."""
    precision: Float[Tensor, " n"] | None
    """Of the rows on which the matched latent fires, the share on which the feature
    does (0 where it never fires). None where only directions were given."""
    recall: Float[Tensor, " n"] | None
    """Of the rows on which the feature fires, the share on which its latent does."""
    auc: Float[Tensor, " n"] | None
    """P(code on a row where the feature fires > code where it does not), ties half."""
    f1_latents: float | None
    """Mean over LATENTS of F1 for the feature nearest to each: sae_lens' F1."""
    l0: float | None
    l0_true: float
    shrinkage: float | None
    """Σ z‖w‖ a / Σ a² where feature and latent both fire; 1 is none, less is too
    small."""
    r2: float | None
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖²."""
    dead: float | None
    """Share of latents that never fire on these rows."""
    n_rows: int

    @property
    def f1(self) -> Float[Tensor, " n"] | None:
        """2 P R / (P + R) of each feature; 0 for a feature without a latent."""
        if self.precision is None:
            return None
        p, r = self.precision, self.recall
        return 2 * p * r / (p + r).clamp_min(1e-12)

    @property
    def corrected(self) -> Float[Tensor, " n"]:
        """(cosine − nearest_other) / (1 − nearest_other): 0 is a wrong feature's."""
        return (self.cosine - self.nearest_other) / (1 - self.nearest_other)

    def share(self, above: float = FOUND, weighted: bool = False) -> float:
        """Share of features with cosine > `above`, or of their firings."""
        found = (self.cosine > above).double()
        weight = self.rates.double() if weighted else torch.ones_like(found)
        return ((found * weight).sum() / weight.sum()).item()

    def by_quartile(self, values: Tensor | None = None) -> list[float]:
        """Mean of `values` (default: found?) in each quarter by rate, rarest first.

        Equal rates are told apart by position.
        """
        values = (self.cosine > FOUND).float() if values is None else values
        order = self.rates.argsort(stable=True)
        return [values[q].double().mean().item() for q in order.tensor_split(4)]

    def row(self) -> dict[str, str | float]:
        """As a row of a table; shares in [0, 1]."""
        out: dict[str, str | float] = {
            "name": self.name,
            "found > 0.9": self.share(),
            "found > 0.95": self.share(WELL_FOUND),
            "of firings": self.share(weighted=True),
            "rarest quarter": self.by_quartile()[0],
            "MMCS": self.mmcs,
            "MMCS latents": self.mmcs_latents,
            "Hungarian": self.cosine.mean().item(),
            "corrected": self.corrected.mean().item(),
            "beats another": (self.corrected > 0).double().mean().item(),
            "uniqueness": self.uniqueness,
        }
        if self.precision is not None:
            out |= {
                "F1": self.f1.mean().item(),
                "precision": self.precision.mean().item(),
                "recall": self.recall.mean().item(),
                "AUC": self.auc.mean().item(),
                "L0": self.l0,
                "L0 error": self.l0 / self.l0_true - 1,
                "shrinkage": self.shrinkage,
                "R²": self.r2,
                "dead": self.dead,
            }
        return out


@torch.no_grad()
def recovery(
    candidate: Autoencoder | Tensor,
    truth: Synthetic,
    *,
    rows: int = 10_000,
    seed: int = 777,
    name: str | None = None,
) -> Recovery:
    """Score `candidate` on `rows` fresh rows of stream `seed`, in blocks.

    A candidate with the attribute `needs_counts` is an oracle: its `encode` is also
    given how many features truly fire on each row.

    Raises: ValueError for a dictionary of another width, or too few rows to see every
        feature.
    """
    W = candidate if isinstance(candidate, Tensor) else candidate.W_dec
    W = W.detach().to(truth.W)
    if W.ndim != 2 or W.shape[1] != truth.d:
        raise ValueError(
            f"the dictionary is {tuple(W.shape)}, but the truth has d = {truth.d}"
        )
    cosine = unit(W) @ truth.W.T
    both_signs = False
    if not isinstance(candidate, Tensor):
        x, acts = truth.sample(min(rows, 256), seed=seed)
        both_signs = bool((_encode(candidate, x, acts) < 0).any())
    signed = cosine.abs() if both_signs else cosine
    match, matched = hungarian(signed)
    _, best_pairs = hungarian(cosine.abs())
    nearest = cosine.abs().argmax(1)
    between = (truth.W @ truth.W.T).fill_diagonal_(-1).amax(1)
    scores = r2 = None
    if not isinstance(candidate, Tensor):
        scores, r2 = _firing(candidate, truth, rows, seed, match, nearest)
    return Recovery(
        name=name or type(candidate).__name__,
        rates=truth.rates.cpu(),
        match=match.cpu(),
        cosine=matched.cpu(),
        nearest_other=between.cpu(),
        mmcs=signed.amax(0).double().mean().item(),
        mmcs_latents=signed.amax(1).double().mean().item(),
        mcc=best_pairs[best_pairs > 0].double().mean().item() if len(W) else 0.0,
        uniqueness=len(nearest.unique()) / len(W),
        precision=scores and scores.precision,
        recall=scores and scores.recall,
        auc=scores and scores.auc,
        f1_latents=scores and scores.f1_latents,
        l0=scores and scores.l0,
        l0_true=truth.rates.sum().item(),
        shrinkage=scores and scores.shrinkage,
        r2=r2,
        dead=scores and scores.dead,
        n_rows=rows if scores else 0,
    )


class Parents(NamedTuple):
    """What became of the parents of a hierarchy; means over all parents. A parent's
    latent is the one with the largest cosine."""

    cosine: float
    children: float
    """Cosine of the latent with the parent's children: 1 / √8 each where parent and 7
    children are merged in equal parts."""
    other_children: float
    """With the children of others: what chance gives."""
    alone: float
    """Of the rows on which the parent fires without a child, the share on which its
    latent fires."""
    with_child: float
    """The same with a child. Much less than `alone` is absorption: the child's latent
    has taken the parent's part over."""


@torch.no_grad()
def parents(
    candidate: Autoencoder, truth: Synthetic, *, rows: int = 5000, seed: int = 777
) -> Parents:
    """Hedging and absorption. Raises ValueError for a truth that is no hierarchy."""
    above = getattr(truth.law, "parent", None)
    if above is None:
        raise ValueError(
            f"{type(truth.law).__name__} has no parents: expected firing='hierarchy'"
        )
    child, parent = (above >= 0).nonzero().flatten(), (above < 0).nonzero().flatten()
    cosine = unit(candidate.W_dec.detach().to(truth.W)) @ truth.W.T
    best = cosine[:, parent].argmax(0)
    own = parent[None, :] == above[child][:, None]
    of_children = cosine[best][:, child].T
    fired = torch.zeros(
        2, 2, device=truth.device
    )  # alone or not; rows, and with latent
    for x, acts in truth._blocks(rows, seed, 0):
        on = acts[:, parent] > 0
        has_child = (acts[:, child] > 0).float() @ own.float() > 0
        latent = _encode(candidate, x, acts)[:, best] > 0
        for i, where in enumerate((on & ~has_child, on & has_child)):
            fired[i] += torch.stack([where.sum(), (where & latent).sum()])
    return Parents(
        cosine[best, parent].mean().item(),
        of_children[own].mean().item(),
        of_children[~own].mean().item(),
        *(fired[:, 1] / fired[:, 0]).tolist(),
    )


def hungarian(
    cosine: Float[Tensor, "m n"],
) -> tuple[Int64[Tensor, " n"], Float[Tensor, " n"]]:
    """The one-to-one matching of largest sum: each column's row (−1), value (0)."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = (
        torch.from_numpy(a).to(cosine.device)
        for a in linear_sum_assignment(cosine.cpu().numpy(), maximize=True)
    )
    match = torch.full((cosine.shape[1],), -1, device=cosine.device)
    value = cosine.new_zeros(cosine.shape[1])
    match[columns] = rows
    value[columns] = cosine[rows, columns]
    return match, value


def random_dictionary(truth: Synthetic, m: int, *, seed: int = 0) -> Dictionary:
    """The null: m random directions around the mean, the true L0 (rounded) kept."""
    generator = torch.Generator().manual_seed(10**6 + seed)
    W = unit(torch.randn(m, truth.d, generator=generator)).to(truth.device)
    k = max(1, min(m, round(truth.rates.sum().item())))
    return Dictionary(W, truth.rows(4096, seed=1).mean(0), k, signed=False)


def controls(truth: Synthetic, m: int, *, seed: int = 0) -> dict[str, Autoencoder]:
    """Two oracles, which are given the true dictionary, and a random dictionary."""
    from saeutils.sparse_coding import SparseCoder

    return {
        "oracle: OMP at the true k": SparseCoder(truth.W, truth.b, "omp at k"),
        "oracle: lasso (as FISTA)": SparseCoder(truth.W, truth.b, "lasso"),
        "random dictionary": random_dictionary(truth, m, seed=seed),
    }


def table(
    candidates: Mapping[str, Autoencoder | Tensor | Recovery],
    truth: Synthetic,
    *,
    rows: int = 10_000,
    seed: int = 777,
) -> "pd.DataFrame":
    """`Recovery.row` of each, then of the controls as wide as the first candidate."""
    import pandas as pd

    first = next(iter(candidates.values()))
    if isinstance(first, Recovery):
        m = truth.n
    else:
        m = len(first if isinstance(first, Tensor) else first.W_dec)
    every = dict(candidates) | controls(truth, m)
    scored = [
        one.row() | {"name": name}
        if isinstance(one, Recovery)
        else recovery(one, truth, rows=rows, seed=seed, name=name).row()
        for name, one in every.items()
    ]
    return pd.DataFrame(scored)


def unit(W: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """Rows of length 1; zero rows stay zero."""
    return torch.nn.functional.normalize(W, dim=1)


def _encode(candidate: Autoencoder, x: Tensor, acts: Tensor) -> Tensor:
    if getattr(candidate, "needs_counts", False):
        return candidate.encode(x, (acts > 0).sum(1))
    return candidate.encode(x)


def _firing(
    candidate: Autoencoder,
    truth: Synthetic,
    rows: int,
    seed: int,
    match: Tensor,
    nearest: Tensor,
) -> tuple[FiringScores, float]:
    """Firing, and R²: one pass over fresh rows."""
    W_norm = candidate.W_dec.detach().norm(dim=1).to(truth.W)
    counts = FiringCounts(truth.n, W_norm, match, nearest)
    moments = RunningMoments(truth.d, device=truth.device)
    error = 0.0
    for x, acts in truth._blocks(rows, seed, 0):
        z = _encode(candidate, x, acts)
        error += (x.double() - candidate.decode(z).double()).square().sum().item()
        moments.update(x)
        counts.update(z, acts)
    return counts.scores(), 1 - error / moments.scatter.sum().item()


def by_group(
    frame: "pd.DataFrame", group: str, columns: Sequence[str]
) -> "pd.DataFrame":
    """`metrics.summary` of each part of a table of recoveries; `group` comes last."""
    import pandas as pd

    parts = frame.groupby(group, sort=False)
    return pd.concat(
        summary(part)[["name", *columns]].assign(**{group: value})
        for value, part in parts
    )
