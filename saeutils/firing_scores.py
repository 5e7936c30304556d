"""Who fires when: latents against true features, counted over blocks of rows."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

AUC_ENTRIES = 2**25  # codes and activations kept for AUC; beyond, rows are left out


class FiringScores(NamedTuple):
    """How firing agrees; the first three by feature, 0 for one without a latent."""

    precision: Float[Tensor, " n"]
    recall: Float[Tensor, " n"]
    auc: Float[Tensor, " n"]
    """NaN for a feature that never fired, or always."""
    f1_latents: float
    """Mean over latents, each against its nearest feature."""
    l0: float
    """Latents that fire on a row, on average."""
    shrinkage: float
    """Σ z‖w‖ a / Σ a² where both fire; NaN if that never happens."""
    dead: float
    """Share of latents that never fired."""


class FiringCounts:
    """Counts of agreement, for features with their latent, and for all latents.

    Args:
        n: true features.
        norms: length of each latent's decoder row: codes are compared in its units.
        match: latent of each feature, −1 for none.
        nearest: feature of each latent.
    """

    def __init__(
        self,
        n: int,
        norms: Float[Tensor, " m"],
        match: Int64[Tensor, " n"],
        nearest: Int64[Tensor, " m"],
    ) -> None:
        m, device = len(norms), norms.device
        self.norms, self.match, self.nearest = norms, match, nearest
        self.rows = 0
        self.fired, self.hits = torch.zeros(2, m, dtype=torch.int64, device=device)
        self.true, self.true_hits = torch.zeros(2, n, dtype=torch.int64, device=device)
        self.product = self.square = 0.0
        self._kept: list[tuple] = []
        self._entries, self._auc_rows = 0, 0
        self._auc_true = torch.zeros(n, dtype=torch.int64, device=device)

    def update(self, z: Float[Tensor, "rows m"], acts: Float[Tensor, "rows n"]) -> None:
        """Count a block of rows."""
        fires = acts > 0
        row, latent = z.nonzero(as_tuple=True)
        self.rows += len(z)
        self.fired += latent.bincount(minlength=len(self.norms))
        hit = fires[row, self.nearest[latent]]
        self.hits += latent[hit].bincount(minlength=len(self.norms))
        self.true += fires.sum(0)
        has = self.match >= 0
        mine = z[:, self.match.clamp_min(0)] * self.norms[self.match.clamp_min(0)]
        mine = mine.abs() * has
        both = fires & (mine > 0)
        self.true_hits += both.sum(0)
        self.product += (mine * acts)[both].double().sum().item()
        self.square += acts[both].double().square().sum().item()
        if self._entries < AUC_ENTRIES:
            r, f = ((mine > 0) | fires).nonzero(as_tuple=True)
            self._kept.append((f.cpu(), mine[r, f].cpu(), fires[r, f].cpu()))
            self._entries += len(f)
            self._auc_rows += len(z)
            self._auc_true += fires.sum(0)

    def scores(self) -> FiringScores:
        """Of all blocks so far, at least one."""
        match = self.match.clamp_min(0)
        tp = self.true_hits.double()
        fired = torch.where(self.match >= 0, self.fired[match], 0).double()
        latents_p = self.hits.double() / self.fired.clamp_min(1)
        latents_r = self.hits.double() / self.true[self.nearest].clamp_min(1)
        f1 = 2 * latents_p * latents_r / (latents_p + latents_r).clamp_min(1e-12)
        return FiringScores(
            precision=(tp / fired.clamp_min(1)).float().cpu(),
            recall=(tp / self.true.clamp_min(1)).float().cpu(),
            auc=self._auc(),
            f1_latents=f1.mean().item(),
            l0=self.fired.sum().item() / self.rows,
            shrinkage=self.product / self.square if self.square else float("nan"),
            dead=(self.fired == 0).double().mean().item(),
        )

    def _auc(self) -> Float[Tensor, " n"]:
        feature, score, fires = (
            torch.cat(parts).numpy() for parts in zip(*self._kept, strict=True)
        )
        positives = self._auc_true.cpu().numpy()
        return torch.from_numpy(
            sparse_auc(feature, score, fires, positives, self._auc_rows)
        ).float()


def sparse_auc(
    feature: np.ndarray,
    score: np.ndarray,
    positive: np.ndarray,
    positives: np.ndarray,
    rows: int,
) -> np.ndarray:
    """AUC of each feature from the entries with score ≠ 0 or positive; others score 0.

    P(score of a positive > score of a negative) + P(equal) / 2; NaN without positives
    or negatives. Scores ≥ 0.

    Args:
        positives: number of positive rows of each feature, of `rows`.
    """
    negatives = rows - positives
    order = np.lexsort((score, feature))
    f, s, y = feature[order], score[order], positive[order].astype(float)
    # Runs of equal (feature, score): a run's positives beat all negatives below.
    new = np.ones(len(f), bool)
    new[1:] = (f[1:] != f[:-1]) | (s[1:] != s[:-1])
    run = np.cumsum(new) - 1
    up, size = np.bincount(run, y), np.bincount(run)
    of, value, down = f[new], s[new], size - up
    zero_down = negatives - np.bincount(of, down, minlength=len(positives))
    before = np.cumsum(down) - down
    first = np.searchsorted(of, np.arange(len(positives)))
    start = np.append(before, before[-1:] if len(before) else 0)[first]
    below = before - start[of] + zero_down[of] * (value > 0)
    equal = down + zero_down[of] * (value == 0)
    won = np.bincount(of, up * (below + equal / 2), minlength=len(positives))
    with np.errstate(invalid="ignore", divide="ignore"):
        return won / (positives * negatives)
