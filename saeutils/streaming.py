"""Passes over rows in chunks: bounded memory, and results that do not depend on it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saeutils.store import Store, as_store

Rows = Tensor | Store | str | Path  # (n, d_in), a store, or the path of one
BUDGET = 16 * 2**20  # bytes of one dense block: rows × d_sae, or latents × latents


class Firings(NamedTuple):
    """The entries of a block of codes that are not zero, in order of rows."""

    row: Int64[Tensor, " nnz"]
    latent: Int64[Tensor, " nnz"]
    value: Float[Tensor, " nnz"]


def firings(z: Float[Tensor, "chunk d_sae"]) -> Firings:
    """Sparse view of dense codes; far cheaper to sum over than the codes themselves."""
    row, latent = z.nonzero(as_tuple=True)
    return Firings(row, latent, z[row, latent])


class RunningMoments:
    """Mean and centred squares of rows that arrive in chunks, in float64.

    Chan, Golub and LeVeque's pairwise update (1979): no cancellation, however far the
    mean is from zero, and the same result for every chunk size up to rounding.

    Attributes:
        n: rows so far; mean: (d,); scatter: Σ (x − mean)² a dimension (d,), or
        Σ (x − mean)(x − mean)ᵀ (d, d) with `covariance=True`.
    """

    def __init__(self, d: int, covariance: bool = False, device: Any = "cpu"):
        options = dict(dtype=torch.float64, device=device)
        self.n = 0
        self.mean = torch.zeros(d, **options)
        self.scatter = torch.zeros((d, d) if covariance else d, **options)

    def update(self, x: Float[Tensor, "n d"]) -> None:
        x = x.double()
        chunk_mean = x.mean(0)
        centred, delta = x - chunk_mean, chunk_mean - self.mean
        total = self.n + len(x)
        weight = self.n * len(x) / total
        if self.scatter.ndim == 2:
            self.scatter += centred.T @ centred + weight * torch.outer(delta, delta)
        else:
            self.scatter += centred.square().sum(0) + weight * delta.square()
        self.mean += delta * (len(x) / total)
        self.n = total


def rows_within(budget: int, width: int) -> int:
    """Rows of `width` floats that fit in `budget` bytes, at least one."""
    return max(1, budget // (4 * max(width, 1)))


def checked_chunks(
    rows: Rows, d_in: int, size: int, device: Any = "cpu"
) -> Iterator[Float[Tensor, "chunk d_in"]]:
    """The rows in order, `size` at a time; refuses the wrong width, NaN and no rows."""
    store = as_store(rows)
    if len(store) == 0:
        raise ValueError("there are no rows: at least one is needed")
    if store.d_in != d_in:
        raise ValueError(
            f"the rows have d_in = {store.d_in}, but the autoencoder takes "
            f"d_in = {d_in}: were they saved at another hook point?"
        )
    for batch in store.chunks(size):
        x = batch.rows.to(device)
        if not x.isfinite().all():
            bad = int((~x.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"row {int(batch.index[bad])} contains NaN or Inf")
        yield x
