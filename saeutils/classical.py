"""Dictionaries by scikit-learn, to stand in the same tables as SAEs."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from saeutils.baselines import Dictionary
from saeutils.sparse_coding import SparseCoder


def classical_dictionaries(
    rows: Float[Tensor, "rows d"],
    m: int,
    l0: int | float,
    *,
    penalty: int | float = 0.15,
    learning_rows: int = 4000,
    seed: int = 0,
) -> dict[str, Dictionary | SparseCoder]:
    """MiniBatchDictionaryLearning, FastICA and k-means of `rows`, ready to be scored.

    Dictionary learning (m atoms, codes ≥ 0, λ = `penalty`) takes milliseconds a row,
    so it sees the first `learning_rows`, twice. It keeps sparse inference as encoder.
    ICA finds at most d directions; k-means m, its centres less the mean. Both read by
    their own directions, the round(l0) largest codes a row (ICA: of either sign).
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import FastICA, MiniBatchDictionaryLearning
    from sklearn.exceptions import ConvergenceWarning

    mean = rows.mean(0)
    x, k = (rows - mean).numpy(), max(1, round(l0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        learned = MiniBatchDictionaryLearning(
            m,
            alpha=penalty,
            batch_size=256,
            max_iter=2,
            fit_algorithm="cd",
            positive_code=True,
            random_state=seed,
        ).fit(rows[:learning_rows].numpy())
        ica = FastICA(min(x.shape[1], m), max_iter=100, random_state=seed).fit(x)
    centres = MiniBatchKMeans(m, n_init=1, batch_size=2048, random_state=seed).fit(x)

    def unit(W) -> Tensor:
        W = torch.as_tensor(W).float()
        return torch.nn.functional.normalize(W, dim=1)

    zero = torch.zeros_like(mean)
    return {
        "dictionary learning": SparseCoder(
            unit(learned.components_), zero, penalty=penalty
        ),
        "ICA": Dictionary(unit(ica.mixing_.T), mean, k),
        "k-means": Dictionary(unit(centres.cluster_centers_), mean, k, signed=False),
    }
