"""How readable a representation is: probes, few-latent probes, clusters, purity.

scikit-learn does the fitting; here is what it lacks: one protocol for all
representations, logistic regression on every single latent at once, and scores of one
latent. A representation is a matrix (n, d), a row an image; codes are mostly zero.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from saeutils.examples import Codes, top_examples

if TYPE_CHECKING:
    import pandas as pd

CS = (1.0, 10.0, 100.0, 1000.0)  # inverse strengths of the penalty that are tried
SPARSE = 0.25  # a matrix with fewer non-zeros than this is kept as CSR
#: what a 1-D probe that knows nothing loses, in nats: both answers equally likely
CHANCE = math.log(2)


class LinearProbe(NamedTuple):
    """A linear classifier and what it was chosen from."""

    accuracy: float
    """Share of the test rows that it gets right."""
    C: float
    """The inverse penalty with the best validation accuracy."""
    at_edge: bool
    """Whether C is the smallest or largest of those tried: then try more."""
    validation: dict[float, float]
    """C -> accuracy on the held-out part of the training rows."""


def linear_probe(
    x: Float[Tensor, "n d"],
    y: Int64[Tensor, " n"],
    x_test: Float[Tensor, "m d"],
    y_test: Int64[Tensor, " m"],
    *,
    kind: str = "logistic",
    cs: Sequence[float] = CS,
    validation: float = 0.25,
    seed: int = 0,
) -> LinearProbe:
    """Logistic regression, or a linear SVM, whose C is chosen on held-out rows.

    The protocol is the same for every representation: rows are divided by one number,
    the root of their mean squared length (directions keep their sizes relative to each
    other, and C means the same); `seed` alone says which rows validate; the best C
    (the smallest, of equals) is fitted again on all n rows.

    Args:
        kind: "logistic" (multinomial, L-BFGS) or "svm" (one against the rest, squared
            hinge).
        validation: share of the rows on which C is chosen.

    Raises:
        ValueError: another kind, no C, rows without spread, labels of another number.
    """
    if kind not in ("logistic", "svm"):
        raise ValueError(f'kind must be "logistic" or "svm", got {kind!r}')
    if len(cs) == 0 or min(cs) <= 0 or not 0 < validation < 1:
        raise ValueError(
            f"cs {tuple(cs)} must be positive, validation {validation} in (0, 1)"
        )
    scale, parts = _scale(x), []
    for rows, labels in ((x, y), (x_test, y_test)):
        if len(rows) != len(labels):
            raise ValueError(f"{len(labels)} labels for {len(rows)} rows")
        parts.append((_matrix(rows / scale), labels.numpy()))
    (x_all, y_all), test = parts
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, rest = order.split(
        [round(validation * len(x)), len(x) - round(validation * len(x))]
    )
    scores = {}
    for c in sorted(cs):
        probe = _probe(kind, c).fit(x_all[rest.numpy()], y_all[rest.numpy()])
        scores[c] = float(probe.score(x_all[held.numpy()], y_all[held.numpy()]))
    best = max(scores, key=lambda c: scores[c])
    accuracy = float(_probe(kind, best).fit(x_all, y_all).score(*test))
    edge = len(cs) > 1 and best in (min(cs), max(cs))
    return LinearProbe(accuracy, best, edge, scores)


def _probe(kind: str, c: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    if kind == "svm":
        return LinearSVC(C=c, tol=1e-2, max_iter=2000, random_state=0)
    return LogisticRegression(C=c, tol=1e-3, max_iter=500)


def _scale(x: Tensor) -> float:
    scale = x.double().square().sum(1).mean().sqrt().item()
    if not 0 < scale < math.inf:
        raise ValueError(f"the rows have a root mean square length of {scale}")
    return scale


def _matrix(x: Tensor) -> Any:
    """float32, as CSR where that is smaller."""
    from scipy.sparse import csr_matrix

    dense = x.detach().cpu().float().numpy()
    return csr_matrix(dense) if (dense != 0).mean() < SPARSE else dense


class SingleProbes(NamedTuple):
    """The best logistic regression on every single latent, for every class."""

    loss: Float64[np.ndarray, "d classes"]
    """Class-balanced cross-entropy in nats; `CHANCE` (ln 2) for a useless latent."""
    weight: Float64[np.ndarray, "d classes"]
    bias: Float64[np.ndarray, "d classes"]

    def best(self, n: int = 1) -> Int64[np.ndarray, "n classes"]:
        """The n latents of least loss for each class, best first."""
        return np.argsort(self.loss, axis=0, kind="stable")[:n]


def single_probes(
    x: Float[Tensor, "n d"],
    y: Int64[Tensor, " n"],
    *,
    ridge: float = 1e-4,
    most: int = 60,
    tolerance: float = 1e-7,
) -> SingleProbes:
    """The 1-D probe loss of each latent i and class c (Gao et al. 2024):

        min over w, b of  Σ_n u_n [softplus(w x_ni + b) − t_n (w x_ni + b)] + penalty

    with t_n = [y_n = c] and u_n such that class and rest weigh ½ each, so that the
    loss without any knowledge is ln 2. The penalty is ½ ridge (w s_i)², s_i the root
    mean square of the latent where it is not zero: it keeps w finite where the
    class is told apart perfectly; it is not part of the loss given back.

    Newton's method with halved steps, all latents at once; rows on which a latent is
    zero are counted, not visited, so that codes cost little.

    Raises:
        ValueError: fewer than two classes, labels of another number than rows.
    """
    from scipy.sparse import csc_matrix

    if len(x) != len(y):
        raise ValueError(f"{len(y)} labels for {len(x)} rows: each row needs one")
    classes = np.unique(y.numpy())
    if len(classes) < 2:
        raise ValueError(f"a probe needs two classes or more, got {classes.tolist()}")
    columns = csc_matrix(x.detach().cpu().float().numpy()).astype(np.float64)
    d, count = x.shape[1], np.diff(columns.indptr)
    latent, row = np.repeat(np.arange(d), count), columns.indices

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(latent, values, d)

    rms = np.sqrt(total(columns.data**2) / np.maximum(count, 1))
    rms[rms == 0] = 1
    v = columns.data / rms[latent]
    out = np.zeros((3, d, len(classes)))
    for j, c in enumerate(classes):
        t = y.numpy() == c
        u = np.where(t, 0.5 / t.sum(), 0.5 / (~t).sum())[row]
        t = t[row].astype(float)
        # What the rows at zero weigh: those of the class, and the rest.
        zeros = np.stack([0.5 - total(u * t), 0.5 - total(u * (1 - t))])

        def at(w, b, t=t, u=u, zeros=zeros):
            """The loss of every latent there, and Newton's step H⁻¹ g (H is 2 × 2)."""
            a = w[latent] * v + b[latent]
            (p, soft), (p0, soft0) = _logistic(a), _logistic(b)
            loss = total(u * (soft - t * a))
            loss += zeros[0] * (soft0 - b) + zeros[1] * soft0
            e, h, h0 = u * (p - t), u * p * (1 - p), zeros.sum(0) * p0 * (1 - p0)
            g_w = total(e * v) + ridge * w
            g_b = total(e) + zeros.sum(0) * p0 - zeros[0]
            h_ww, h_wb, h_bb = total(h * v * v) + ridge, total(h * v), total(h) + h0
            det = np.maximum(h_ww * h_bb - h_wb**2, 1e-12)
            step = h_bb * g_w - h_wb * g_b, h_ww * g_b - h_wb * g_w
            return loss, loss + 0.5 * ridge * w**2, np.stack(step) / det

        place, size, done = np.zeros((2, d)), np.ones(d), np.zeros(d, bool)
        fit, aim, step = at(*place)
        for _ in range(most):
            new = place - size * step
            new_fit, new_aim, new_step = at(*new)
            good = new_aim <= aim
            done |= abs(aim - new_aim) < tolerance
            size = np.where(good, np.minimum(1, 2 * size), size / 4)
            place, step = np.where(good, (new, new_step), (place, step))
            fit, aim = np.where(good, (new_fit, new_aim), (fit, aim))
            if done.all():
                break
        out[:, :, j] = fit, place[0] / rms, place[1]
    return SingleProbes(*out)


def _logistic(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 / (1 + exp(−a)) and log(1 + exp(a)), without overflow."""
    e = np.exp(-abs(a))
    return np.where(a >= 0, 1, e) / (1 + e), np.maximum(a, 0) + np.log1p(e)


def sparse_probes(
    x: Float[Tensor, "n d"],
    y: Int64[Tensor, " n"],
    x_test: Float[Tensor, "m d"],
    y_test: Int64[Tensor, " m"],
    *,
    ks: Sequence[int] = (1, 2, 5, 10),
    single: SingleProbes | None = None,
    C: float = 100.0,
    most: int = 60,
    tolerance: float = 1e-7,
) -> "pd.DataFrame":
    """How well k latents tell a class from the rest (k-sparse probing).

    The k latents are those of least 1-D probe loss on the training rows, each for
    itself; on them class-balanced logistic regression is fitted. Source: Gurnee et al.
    (2023), who choose by difference of means.

    Args:
        single: of the same x and y, when at hand.
        most, tolerance: of `single_probes`; with tolerance=1e-4 the order of latents
            is hardly another and many latents are several times faster.

    Returns:
        One row a (k, class): k, class, score (balanced accuracy on the test rows, 0.5
        by chance), latents (the k, best first).

    Raises:
        ValueError: a k that is not in 1..d.
    """
    import pandas as pd
    from sklearn.linear_model import LogisticRegression

    if not 1 <= min(ks) <= max(ks) <= x.shape[1]:
        raise ValueError(f"each k must lie in 1..{x.shape[1]}, got {tuple(ks)}")
    if single is None:
        single = single_probes(x, y, most=most, tolerance=tolerance)
    ranked, rows = single.best(max(ks)), []
    scale = x.square().mean(0).sqrt().clamp(min=1e-12)
    for j, c in enumerate(y.unique().tolist()):
        t, t_test = (y == c).numpy(), (y_test == c).numpy()
        for k in ks:
            chosen = ranked[:k, j]
            few, test = (v[:, chosen] / scale[chosen] for v in (x, x_test))
            probe = LogisticRegression(C=C, class_weight="balanced", tol=1e-3)
            hit = probe.fit(few.numpy(), t).predict(test.numpy()) == t_test
            score = (hit[t_test].mean() + hit[~t_test].mean()) / 2
            rows.append((k, c, float(score), chosen.tolist()))
    return pd.DataFrame(rows, columns=["k", "class", "score", "latents"])


class Clusters(NamedTuple):
    """Clusters found without labels, and how they compare with the labels."""

    nmi: float
    """Normalised mutual information with the labels: 0 by chance, 1 the same."""
    ari: float
    """Adjusted Rand index: 0 by chance, 1 the same."""
    silhouette: float
    """How far clusters lie apart, in [−1, 1], whatever they mean."""


def k_means(
    x: Float[Tensor, "n d"],
    y: Int64[Tensor, " n"],
    *,
    normalise: bool = False,
    starts: int = 4,
    silhouette_rows: int = 2000,
    seed: int = 0,
) -> Clusters:
    """k-means with as many clusters as there are labels, best of `starts` starts.

    Args:
        normalise: scale each row to length 1 first (rows of zeros stay).
        silhouette_rows: rows drawn for the silhouette, which compares all pairs.
    """
    from sklearn import metrics
    from sklearn.cluster import KMeans

    x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) if normalise else x
    x, labels = x.float().numpy(), y.numpy()
    means = KMeans(len(np.unique(labels)), n_init=starts, random_state=seed).fit(x)
    found = means.labels_
    few = min(silhouette_rows, len(x))
    return Clusters(
        float(metrics.normalized_mutual_info_score(labels, found)),
        float(metrics.adjusted_rand_score(labels, found)),
        float(
            metrics.silhouette_score(x, found, sample_size=few, random_state=seed)
            if len(np.unique(found)) > 1
            else math.nan
        ),
    )


class PerLatent(NamedTuple):
    """A score of each latent, and which latents have none."""

    score: Float64[Tensor, " d"]
    """NaN for latents that are left out."""
    excluded: Bool[Tensor, " d"]
    """Latents that fire on too few rows for the score to mean anything."""


def monosemanticity(codes: Codes, embeddings: Float[Tensor, "n e"]) -> PerLatent:
    """How alike the images are on which a latent fires, weighted by how much it does:

        MS_i = Σ_{n≠m} z_ni z_mi cos(e_n, e_m) / Σ_{n≠m} z_ni z_mi
             = (‖Σ_n z_ni ê_n‖² − Σ_n z_ni² ‖ê_n‖²) / ((Σ_n z_ni)² − Σ_n z_ni²)

    with ê = e / ‖e‖: the second line costs n · e operations a latent where the first
    costs n² · e. All in float64: the differences cancel. With one-hot labels as
    embeddings it is the chance that two such images share a label.
    Source: Pach et al. (2025), whose min-max scaling of z ≥ 0 drops out of the ratio.

    Left out: latents that fire on fewer than two rows.

    Raises:
        ValueError: another number of embeddings than rows, negative or non-finite
            activations.
    """
    if len(embeddings) != codes.n_rows:
        raise ValueError(f"{len(embeddings)} embeddings for {codes.n_rows} rows")
    d = codes.d_sae
    mass, square, diagonal = torch.zeros(3, d, dtype=torch.float64)
    count = torch.zeros(d, dtype=torch.int64)
    centre = torch.zeros(d, embeddings.shape[1], dtype=torch.float64)
    for row, latent, value in codes:
        if not (value >= 0).all():
            raise ValueError("activations must be ≥ 0: rectify them first")
        value, first = value.double(), int(row[0]) if len(row) else 0
        e = embeddings[first : int(row[-1]) + 1 if len(row) else 0].double()
        e = e / e.norm(dim=1, keepdim=True).clamp(min=1e-300)
        local = row - first
        z = torch.sparse_coo_tensor(
            torch.stack([latent, local]), value, (d, len(e)), check_invariants=False
        )
        centre += z @ e
        mass.index_add_(0, latent, value)
        square.index_add_(0, latent, value**2)
        diagonal.index_add_(0, latent, value**2 * e.square().sum(1)[local])
        count += torch.bincount(latent, minlength=d)
    excluded = count < 2
    score = (centre.square().sum(1) - diagonal) / (mass**2 - square)
    return PerLatent(score.masked_fill(excluded, torch.nan), excluded)


def purity(
    codes: Codes, n: int = 16, *, labels: Int64[Tensor, " rows"] | None = None
) -> PerLatent:
    """Share of the most frequent label among the n strongest images of each latent.

    Left out: latents that fire on fewer than n images. Chance is not one in the
    number of classes: even among n random labels one is the most frequent.

    Args:
        labels: of each row; those of `codes` when not given. Shuffled labels give the
            null.

    Raises:
        ValueError: no labels.
    """
    labels = codes.labels if labels is None else labels
    if labels is None:
        raise ValueError("the rows carry no labels: pass labels=, one a row")
    score = torch.full((codes.d_sae,), torch.nan, dtype=torch.float64)
    for example in top_examples(codes, n):
        if len(example.rows) == n:
            most = labels[example.rows].unique(return_counts=True)[1].max()
            score[example.latent] = most.item() / n
    return PerLatent(score, score.isnan())
